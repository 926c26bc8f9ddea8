import torch

from polymodal.models.nets import bagel, ldm_autoencoder
from tests.golden import recipe
from tests.golden.net import Net, Outcome


def build(document):
    return bagel.build(document["config"])


def run(module, case, inputs, document):
    inputs = {
        name: recipe.given(name, value) for name, value in document["cases"]["loss"]["inputs"].items()
    } | inputs
    size, patch = document["config"]["latent_patch_size"], document["config"]["vit_config"]["patch_size"]
    clean = [
        bagel.patchify(latent[:, : h * size, : w * size], size)
        for latent, (h, w) in zip(
            inputs["padded_latent"], inputs["patchified_vae_latent_shapes"].tolist(), strict=True
        )
    ]
    images = [inputs[name] for name in sorted(inputs) if name.startswith("vit_image")]
    samples = inputs["attention_allowed"]["per_sample"]
    out = module(
        text_ids=inputs["packed_text_ids"],
        text_indexes=inputs["packed_text_indexes"],
        position_ids=inputs["packed_position_ids"],
        masks=[torch.tensor([[c == "1" for c in row] for row in rows]) for rows in samples],
        ce_indexes=inputs["ce_loss_indexes"],
        labels=inputs["packed_label_ids"],
        vit_patches=torch.cat([bagel.patchify(image, patch) for image in images]),
        vit_indexes=inputs["packed_vit_token_indexes"],
        vit_position_ids=inputs["packed_vit_position_ids"],
        vit_lengths=inputs["vit_token_seqlens"],
        latents=torch.cat(clean),
        latent_indexes=inputs["packed_vae_token_indexes"],
        latent_position_ids=inputs["packed_latent_position_ids"],
        times=module.shifted(inputs["packed_timesteps"].sigmoid()),
        noise=inputs["noise"],
    )
    if case == "hidden":
        return Outcome({"last_hidden_state": out.hidden})
    if case == "loss":
        return Outcome({"loss": out.loss}, {"ce": out.text_loss, "mse": out.image_loss, "loss": out.loss})
    return Outcome({"ce": out.text_losses, "mse": out.image_losses})


def build_autoencoder(document):
    return ldm_autoencoder.autoencoder_kl(document["config"])


def run_autoencoder(module, case, inputs, document):
    mean = module.encode(inputs["x"]).latent_dist.mode()
    latent = module.config.scaling_factor * (mean - module.config.shift_factor)
    if case == "encode":
        return Outcome({"latent": latent})
    decoded = module.decode(latent / module.config.scaling_factor + module.config.shift_factor).sample
    return Outcome({"reconstruction": decoded})


def published(module, document):
    return {key: name for name, key in ldm_autoencoder.published_names(module).items()}


NETS = [
    Net(models=("BAGEL 7B-MoT",), build=build, run=run, outputs_bound=1e-6, gradients_bound=5e-6),
    Net(models=("BAGEL autoencoder",), build=build_autoencoder, run=run_autoencoder, names=published),
]
