"""Channel-range plots: the right pictures, the same bytes, and one line where there is nothing to draw."""

import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from ptq.errors import BadInput
from ptq.plots import FILE, draw_ranges

C = 12


def site(block: int, name: str, *, reordered: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(block)
    low = -rng.random(C, dtype=np.float32)
    found = {"min": low, "max": low + 1}
    if reordered:
        found |= {"permutation": np.argsort(low), "sizes": np.array([5, 0, 7])}
    return {f"blocks.{block}.{name}.{part}": value for part, value in found.items()}


def folder_with(path, *sites: dict[str, np.ndarray]):
    save_file({name: value for one in sites for name, value in one.items()}, path / FILE)
    return path


def test_first_middle_and_last_block_and_only_the_sites_that_are_there(tmp_path):
    folder = folder_with(tmp_path, *(site(block, name) for block in range(5) for name in ("R1", "q", "R5")))
    files = draw_ranges(folder, tmp_path / "plots")
    assert [file.name for file in files] == [
        f"block-{block}-{name}.png" for block in (0, 2, 4) for name in ("R1", "R5")
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_the_same_ranges_give_the_same_bytes_without_a_date_or_a_version(tmp_path):
    folder = folder_with(tmp_path, site(0, "R1"))
    first, second = (draw_ranges(folder, tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second
    assert b"tEXt" not in first and b"tIME" not in first


def test_the_picture_depends_on_the_order(tmp_path):
    pictures = []
    for name, tensors in (("a", site(0, "R1")), ("b", site(0, "R1", reordered=False))):
        (tmp_path / name).mkdir()
        pictures.append(draw_ranges(folder_with(tmp_path / name, tensors), tmp_path / name)[0].read_bytes())
    assert pictures[0] != pictures[1]


def test_outliers_and_flat_channels_are_drawn(tmp_path):
    tensors = site(0, "R1")
    tensors["blocks.0.R1.max"][3] = 1e6
    flat = {
        name.replace("R1", "R4"): value * 0 if value.dtype == np.float32 else value for name, value in tensors.items()
    }
    assert len(draw_ranges(folder_with(tmp_path, tensors, flat), tmp_path)) == 2


@pytest.mark.parametrize(
    "change, options, part",
    [
        (lambda t: t.pop("blocks.0.R1.max"), {}, "min but no max"),
        (lambda t: t.update({"blocks.0.R1.sizes": np.array([C - 1])}), {}, f"tensors for [{C - 1}, {C}] channels"),
        (lambda t: None, {"blocks": [0, 7]}, "no ranges of block 7"),
        (lambda t: None, {"sites": ["R4"]}, "no ranges of sites R4; there are R1"),
        (lambda t: (t.clear(), t.update(x=np.zeros(1))), {}, "holds no channel ranges"),
    ],
)
def test_ranges_that_cannot_be_drawn(change, options, part, tmp_path):
    tensors = site(0, "R1")
    change(tensors)
    with pytest.raises(BadInput) as error:
        draw_ranges(folder_with(tmp_path, tensors), tmp_path / "plots", **options)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_ranges_and_a_damaged_file(tmp_path):
    with pytest.raises(BadInput, match="nothing to plot"):
        draw_ranges(tmp_path, tmp_path)
    (tmp_path / FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(BadInput, match="cannot be read"):
        draw_ranges(tmp_path, tmp_path)


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, site(0, "R1"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"pip install 'ptq-toolkit\[compress\]'"):
        draw_ranges(folder, tmp_path)
