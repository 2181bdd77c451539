import dataclasses

import pytest

from grn_lightning.metrics import METRICS, Measurement, Protocol
from grn_lightning.metrics.protocols import CONVENTIONS, find_convention


def published(**changes: object) -> Protocol:
    facts = {
        "features": "torch_fidelity",
        "num_samples": 50_000,
        "reference": "train-0123abcd",
        "rounding": "round",
        "resize": "tensorflow",
        "network": "inception-2015-12-05-6726825d",
    }
    return Protocol(**(facts | changes))


def test_a_tag_says_features_count_and_rounding() -> None:
    assert published().tag("fid") == "FID[torch_fidelity,50k,round]"
    assert published(num_samples=1500).tag("sfid", "val") == "sFID[torch_fidelity,1500,round,val]"
    assert Protocol(features="digits-cnn", num_samples=200).tag("rfid") == "rFID[digits-cnn,200]"


def test_the_text_of_a_number_is_never_the_number_alone() -> None:
    measured = Measurement(metric="fid", value=3.5612, protocol=published())
    assert str(measured) == f"{measured}" == "FID[torch_fidelity,50k,round]=3.561"
    spread = dataclasses.replace(measured, metric="is", value=302.44, spread=4.56)
    assert str(spread) == "IS[torch_fidelity,50k,round]=302.4 +- 4.6"
    with pytest.raises(TypeError, match="unsupported format"):
        f"{measured:.2f}"
    with pytest.raises(TypeError):
        float(measured)


def test_what_is_not_a_number_is_no_number_in_a_file_either() -> None:
    measured = Measurement(metric="kid", value=float("nan"), protocol=published())
    assert str(measured).endswith("=not defined")
    assert measured.as_dict()["value"] is None


def test_a_protocol_survives_a_file() -> None:
    assert Protocol.from_dict(published().as_dict()) == published()
    with pytest.raises(ValueError, match=r"lacks \['num_samples'\] and has unknown fields \['x'\]"):
        Protocol.from_dict({"features": "adm", "x": 1})


def test_impossible_protocols_are_refused_with_all_reasons() -> None:
    with pytest.raises(ValueError, match="num_samples .* -1; rounding must be one of round, trunc"):
        Protocol(features="adm", num_samples=-1, rounding="up")  # type: ignore[arg-type]


def test_protocols_differ_by_network_and_scaling_and_not_by_count_or_rounding() -> None:
    others = {"rounding": "truncate", "num_samples": 10, "features": "adm", "reference": ""}
    assert published().mismatch(published(**others)) == []
    found = published().mismatch(published(resize="pil-bicubic", network="inception-random"))
    assert found == [
        "resize 'tensorflow' and 'pil-bicubic'",
        "network 'inception-2015-12-05-6726825d' and 'inception-random'",
    ]
    assert published(network="").mismatch(published(features="adm")) == [
        "features 'torch_fidelity' and 'adm'"
    ]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'fids'; known are {', '.join(METRICS)}"):
        published().tag("fids")
    with pytest.raises(ValueError, match=f"'tf'; known are {', '.join(CONVENTIONS)}"):
        find_convention("tf")
