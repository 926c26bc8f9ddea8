from torch import nn

from polymodal.models.nets import videoalign
from tests.golden import recipe
from tests.golden.net import Net, Outcome


def build(document):
    return videoalign.build(document["config"], attn_implementation="eager")


def names(module, document):
    new = {"visual.": "model.visual.", "model.": "model.language_model."}
    return {
        name: renamed + name.removeprefix(old)
        for name in document["state_dict"]
        for old, renamed in new.items()
        if name.startswith(old)
    }


def run(module, case, inputs, document):
    if "as_in" in inputs:
        given = document["cases"][inputs["as_in"]]["inputs"]
        inputs = {name: recipe.given(name, value) for name, value in given.items()}
    pooling = case.split("_")[1] if case.startswith("rewards") else "special"
    out, width = document["state_dict"]["rm_head.weight"]
    out = out if pooling == "special" else 3  # as the notes say
    module.rm_head = nn.Linear(width, out, bias=False)
    module.rm_head.weight = nn.Parameter(recipe.weight("rm_head.weight", [out, width], document))
    rewards = {}
    for side in "AB":
        own = {
            name[:-2]: value
            for name, value in inputs.items()
            if name.endswith(f"_{side}") and name != f"{side}_scores"
        }
        rewards[f"rewards_{side}"] = module(**own, reward_token=pooling)
    if case.startswith("rewards"):
        return Outcome(rewards)
    scores = (inputs["A_scores"], inputs["B_scores"])
    loss = videoalign.reward_loss(
        case.removeprefix("loss_"), *rewards.values(), inputs["chosen_label"], *scores
    )
    return Outcome({"loss": loss})


NETS = [
    Net(
        models=("VideoAlign reward model",),
        build=build,
        run=run,
        names=names,
        outputs_bound=1e-6,
        gradients_bound=5e-6,
    )
]
