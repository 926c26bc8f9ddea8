"""Self-Forcing's losses of three tiny nets, all in the causal class: a score net's one block is the whole clip."""

import torch
from torch.nn.functional import pad

from polymodal.objectives import self_forcing
from tests.golden import check, recipe
from tests.golden.net import Net
from tests.golden.nets import causal_wan

NAMES = ("generator", "fake_score", "real_score")


def compare(document):
    nets, published = {}, {}
    for name in NAMES:
        config = dict(document["config"])
        if name != "generator":
            config["num_frame_per_block"] = 1000
        nets[name] = causal_wan.build({"config": config}).double().eval()
        keys = [key for key in document["state_dict"] if key.startswith(f"{name}.")]
        own = {"config": config, "state_dict": dict.fromkeys(key.removeprefix(f"{name}.") for key in keys)}
        for key, ours in causal_wan.names(nets[name], own).items():
            published[f"{name}.{key}"] = f"{name}.{ours}"
    module = torch.nn.ModuleDict(nets)
    check.load(module, Net(models=(), names=lambda *_: published), document)
    parameters = dict(module.named_parameters())

    def given(entry, name):
        return recipe.given(name, entry[name])

    def text(name):
        rows = given(document["shared_inputs"], name)
        return pad(rows, (0, 0, 0, document["config"]["text_len"] - rows.shape[1]))

    def score(name, context):
        def flow(x, timestep):
            return nets[name](x, timestep[:, None].expand(-1, x.shape[2]), context, return_dict=False)[0]

        return flow

    table, found = self_forcing.levels(), []
    for case, entry in document["cases"].items():
        inputs = {name: given(entry["inputs"], name) for name in entry["inputs"]}
        module.zero_grad()
        if case.startswith("rollout"):
            start, *noises = inputs.values()
            queue = iter(noises)

            def fresh(x, queue=queue):
                return next(queue).unflatten(0, (len(x), -1)).transpose(1, 2)

            step = int(case.rpartition(" ")[2])
            out = self_forcing.rollout(
                nets["generator"], start.transpose(1, 2), text("context"), step, fresh, table
            )
            error = recipe.output_error(out.transpose(1, 2).contiguous(), entry["outputs"]["output"])
            found.append((case, "output", error))
            steps = [*self_forcing.STEPS, 0]
            found.append((case, "from_to", recipe.scalar_error(steps[step : step + 2], entry["from_to"])))
            continue
        if case.startswith("ode"):
            states = next(value for value in inputs.values() if value.dim() == 6).transpose(2, 3)
            index = next(value for value in inputs.values() if not value.is_floating_point())
            loss = self_forcing.ode_regression(nets["generator"], states, index, text("context"), table)
            found.append((case, "loss", recipe.scalar_error(loss.item(), entry["loss"])))
            continue
        image, noise = inputs.values()
        image, noise = image.transpose(1, 2).requires_grad_(), noise.transpose(1, 2)
        timestep = self_forcing.training_timestep(torch.tensor([entry["t_drawn"]]))
        found.append((case, "timestep", recipe.scalar_error(float(timestep), entry["timestep"])))
        if case.startswith("dmd"):
            scores = [
                score(*pair) for pair in (("fake_score", text("context")), ("real_score", text("context")))
            ]
            loss, gradient = self_forcing.distribution_matching(
                image, noise, timestep, *scores, score("real_score", text("negative")), table
            )
            loss.backward()
            mean = recipe.scalar_error(gradient.abs().mean().item(), entry["mean_abs_gradient_before_mean"])
            found.append((case, "mean gradient", mean))
            error = recipe.output_error(image.grad.transpose(1, 2).contiguous(), entry["grad_image"])
            found.append((case, "gradient of the image", error))
        else:
            loss = self_forcing.critic(image, noise, timestep, score("fake_score", text("context")), table)
            loss.backward()
            digests = entry["grads"]
            largest = max(digest[1] for digest in digests.values() if digest)
            errors = {
                name: recipe.gradient_error(name, parameters[published[name]].grad, digest, largest)
                for name, digest in digests.items()
            }
            worst = max(errors, key=errors.get)
            found.append((case, f"gradients (worst: {worst})", errors[worst]))
        found.append((case, "loss", recipe.scalar_error(loss.item(), entry["loss"])))
    return found


NETS = [Net(models=("Self-Forcing: rollout",), compare=compare, outputs_bound=1e-6)]
