import pytest
import torch
from torch import nn

from grn_lightning.models.convert import load_official


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"ema": weights, "vae": build().state_dict(), "epoch": 3},
        lambda weights: {"vae": weights},
        lambda weights: {
            "model": build().state_dict(),
            "model_ema1": {f"net.{name}": tensor for name, tensor in weights.items()},
            "epoch": 599,
        },
    ],
    ids=["flat", "tokenizer with average", "tokenizer", "class-conditional"],
)
def test_averaged_weights_are_found_in_every_published_wrapping(wrap):
    model, source = build(), build()
    load_official(model, wrap(source.state_dict()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_a_misfit_is_listed_and_loads_nothing():
    model, weights = build(), build().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del weights["0.bias"]
    weights["1.weight"] = torch.zeros(1, 4)
    weights["2.weight"] = torch.zeros(5)
    with pytest.raises(ValueError, match="does not fit Sequential") as caught:
        load_official(model, weights)
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing 0.bias (3)",
        "unexpected 2.weight (5)",
        "other shape 1.weight (1, 4) in the file, (1, 3) in the model",
    ]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_long_list_is_cut():
    with pytest.raises(ValueError, match=r"\.\.\. and 14 more"):
        load_official(build(), {f"{i}.weight": torch.zeros(1) for i in range(10, 40)})
