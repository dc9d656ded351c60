"""What studies/fidelity/fidelity.py counts, and how it varies the shared basis of a codec."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

import collect
import fidelity
from doc_tables import DOCS, read
from fidelity import figures, of_shared_size
from safetensors.torch import load_file
from tiny import records, save_tiny


def test_figures_by_hand() -> None:
    exact = np.arange(200.0)
    got = exact.copy()
    got[[0, 195]] = got[[195, 0]]  # one of the best has the worst place
    found = figures(exact, got)
    assert (found["top10"], found["top100"]) == (9, 99)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 * 195**2 / (200 * (200**2 - 1)))
    assert found["rmse"] == pytest.approx(np.sqrt(2 * 195**2 / 200) / exact.std())


def test_a_shared_basis_with_room_for_the_sample_tells_its_rows_apart() -> None:
    made = torch.randn(90, 4, 64, generator=torch.Generator().manual_seed(0))
    lengths = made.norm(dim=2)
    rows = made / lengths[:, :, None]
    others, taught = of_shared_size(rows, lengths, sample=60, shared=60, size=300, seed=0)
    _, with_few = of_shared_size(rows, lengths, sample=60, shared=8, size=300, seed=0)
    assert taught["spearman"] > 0.99 > with_few["spearman"] + 0.05
    assert taught["rmse"] < 0.1
    assert others["spearman"] < 0.9  # of these it knows what 60 random directions of 256 hold


def asked(folder: Path, counts: str) -> list[str]:
    """The arguments of collect.py for a tiny model and 30 texts."""
    model, adapter = save_tiny(folder, lora=True)
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records(30)))
    sizes = ["--seeds", "0:64,1:32", "--projected", "4"]
    place = ["--adapter", str(adapter), "--at", "0.5", "--out", str(folder / "study")]
    return [str(model), *place, "--data", f"tiny={data}:{counts}", *sizes]


def test_what_is_collected_of_a_tiny_model(tmp_path: Path) -> None:
    collect.main(asked(tmp_path, "6:10:3"))
    study = json.loads((tmp_path / "study" / "study.json").read_text())
    assert (len(study["sample"]), len(study["scored"]), study["queries"]) == (6, 13, [0, 2, 4])
    exact = load_file(tmp_path / "study" / "exact.safetensors")
    assert exact["products"].shape == (3, 13, len(study["layers"]))
    sketches = load_file(tmp_path / "study" / "sketch-0.safetensors")["scored"].float()
    for number, query in enumerate(study["queries"]):
        torch.testing.assert_close(exact["products"][number, query], torch.ones(len(study["layers"])))
        torch.testing.assert_close(exact["length_scored"][query], exact["length_query"][number])
        torch.testing.assert_close(
            (sketches[query] * sketches[query]).sum(1), torch.ones(len(study["layers"])), rtol=0, atol=0.01
        )


@pytest.mark.parametrize("counts", ["25:10:3", "6:10:11"])
def test_fewer_texts_than_are_asked_for_are_refused(tmp_path: Path, counts: str) -> None:
    with pytest.raises(SystemExit, match="the file has 30 texts that can be used; ask for fewer"):
        collect.main(asked(tmp_path, counts))


def test_the_page_shows_the_results() -> None:
    study = Path(fidelity.__file__).parent
    made = fidelity.tables([*sorted(study.glob("*.json")), study.parent / "lds" / "codes.json"])
    assert len(made) == 12
    for name, table in made.items():
        assert read(DOCS / "measured" / "fidelity.md", name) == table, name
