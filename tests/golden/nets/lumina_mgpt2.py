import torch

from polymodal.models.nets import ldm_autoencoder, lumina_mgpt2
from tests.golden import check, recipe
from tests.golden.net import Net


def language_model(document):
    module = lumina_mgpt2.build(document["config"]).double().eval()
    shapes = document["published_shapes"]
    check.load(module, MODEL, document | {"state_dict": shapes})
    for name, parameter in module.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # the biases follow the general rule
            parameter.data = 1 + 0.1 * recipe.normal(name, shapes[name])
    found = []
    for case, entry in document["cases"].items():
        given = {name: recipe.given(name, value) for name, value in entry["inputs"].items()}
        module.zero_grad()
        logits = module(given["input_ids"]).logits
        loss, z_loss = module.losses(logits, given["labels"])
        (loss + 0.01 * z_loss).backward()
        found.append((case, "output logits", recipe.output_error(logits, entry["outputs"]["logits"])))
        for name, value in (("loss", loss), ("z_loss", z_loss)):
            found.append((case, name, recipe.scalar_error(value.item(), entry[name])))
        errors = {}
        for name, (total, norm) in entry["grads_sum_norm"].items():
            gradient = module.get_parameter(name).grad
            error = max(abs(float(gradient.norm()) - norm), abs(float(gradient.sum()) - total))
            errors[name] = error / norm
        worst = max(errors, key=errors.get)
        found.append((case, f"gradients (worst: {worst})", errors[worst]))
    return found


def movqgan(document):
    module = ldm_autoencoder.movqgan(document["config"]).double().eval()
    check.load(module, TOKENIZER, document)
    module.quantize.embedding.weight.data *= 2  # as its notes say
    found = []
    with torch.no_grad():
        for case, entry in document["cases"].items():
            x = recipe.given("x", entry["inputs"]["x"])
            latent = module.encode(x).latents
            quantized, _, (_, _, indices) = module.quantize(latent)
            decoded = module.decode(latent).sample
            for name, value, digest in (
                ("before_quantization", latent, entry["outputs"]["before_quantization"]),
                ("quantized", quantized, entry["outputs"]["quantized"]),
                ("decoded", decoded, document["decoded"]),
            ):
                found.append((case, f"output {name}", recipe.output_error(value, digest)))
            found.append((case, "indices", recipe.scalar_error(indices.flatten().tolist(), entry["indices"])))
    return found


def sequence(document):
    found = []
    for target, wanted in document["crop_sizes"].items():
        sizes = lumina_mgpt2.crop_sizes(int(target))
        ours = {
            "count": len(sizes),
            "first": sizes[:5],
            "last": sizes[-3:],
            "sum_w": sum(width for width, _ in sizes),
            "sum_h": sum(height for _, height in sizes),
            "chosen": {
                name: lumina_mgpt2.crop_size(*map(int, name.split("x")), sizes) for name in wanted["chosen"]
            },
        }
        found.append((target, "crop sizes", recipe.scalar_error(ours, wanted)))
    given = document["sequence"]
    special = given["stub_tokenizer"]["special"]
    width, height = (int(word) for word in given["image"].split() if word.isdigit())
    codes = torch.tensor(given["codes_8x12"]).reshape(height // 8, width // 8)
    text = lumina_mgpt2.prompt_text(given["prompt"].partition("\n")[2], (width, height))
    tokens, labels = lumina_mgpt2.sample(
        [1000 + ord(letter) for letter in text],
        codes,
        given["stub_tokenizer"]["bos"],
        special["<reserved08706>"],
        special["<reserved08802>"] - 2,
    )
    found.append(("sequence", "prompt", recipe.scalar_error(text, given["prompt"])))
    found.append(("sequence", "tokens", recipe.scalar_error(tokens, given["tokens"])))
    return [*found, ("sequence", "labels", recipe.scalar_error(labels, given["labels"]))]


def published(module, document):
    return {key: name for name, key in ldm_autoencoder.published_names(module).items()}


MODEL = Net(models=("Lumina-mGPT 2 language model",), compare=language_model, outputs_bound=1e-6)
TOKENIZER = Net(models=("MoVQGAN of Lumina-mGPT 2",), compare=movqgan, names=published)
NETS = [MODEL, TOKENIZER, Net(models=("Lumina-mGPT 2: crop sizes",), compare=sequence)]
