"""No file is deleted or written over but those that a run recorded as its own."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MAIN, flags, refusal, succeed
from test_compare import COMPARE

from diffattack.classifiers.registry import joined_names
from diffattack.common.errors import InputError
from diffattack.data.images import temporary_name
from diffattack.data.layout import Layout
from diffattack.data.records import ANALYSIS
from diffattack.options import Options
from diffattack.runner.folder import check_folder, clear_run, own_files
from diffattack.runner.setup import check_images_root, check_inputs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["..", "out", "../link"])
def test_a_save_dir_that_holds_inputs_is_refused(data, tmp_path, place):
    photos = shutil.copytree(data / "images", tmp_path / "photos")
    (photos / "img1.png").rename(photos / "0001_panda.png")  # called as a result might be
    (tmp_path / "link").symlink_to(photos)
    before = contents(tmp_path)
    for more in ((), ("--overwrite",)):
        refused = refusal([*MAIN, *flags(data, photos / place, "--images_root", photos, *more)])
        assert "--save_dir" in refused and "give a folder beside it" in refused
        assert contents(tmp_path) == before and not (photos / "out").exists()
    for beside in ("photos2", "out/photos"):
        check_images_root(Options(images_root=photos, save_dir=tmp_path / beside))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The folder of a finished run of four images."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


THEIRS = (
    "0001_panda.png 0001_adv_image.png.bak 00001_adv_image.png 0001_diff_resnet_image_Fail.png labels.txt"
)
THEIRS += " 0004_adv_image.png"  # of an image that the run does not have
THEIRS += f" {ANALYSIS}/notes.txt {ANALYSIS}/my_plot.png {ANALYSIS}/9999_losses.png comparison.md"
THEIRS = (THEIRS + " report_files/thumbnails/mine.webp 00000/0001_adv_image.png").split()


def test_starting_over_deletes_what_the_run_wrote_and_nothing_else(copied):
    for name in THEIRS:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_text("mine")
    clear_run(copied)
    assert set(contents(copied)) == set(THEIRS)
    assert all(text == b"mine" for text in contents(copied).values())


def test_every_file_of_a_run_is_known_as_its_own(copied):
    configuration = json.loads((copied / "run.json").read_text())
    own = own_files(Layout(copied, 4), configuration["model_name"])
    assert {str(path.relative_to(copied)) for path in own} == set(contents(copied))


@pytest.mark.parametrize("content", ["{", '{"name": "theirs", "images": 3}'])
def test_a_run_json_of_others_says_nothing_of_what_may_go(copied, content):
    (copied / "run.json").write_text(content)
    before = contents(copied)
    with pytest.raises(InputError, match="--overwrite: .*run.json.*give another --save_dir"):
        clear_run(copied)
    assert contents(copied) == before


def test_without_a_run_json_nothing_is_deleted(data, copied):
    (copied / "run.json").unlink()
    before = contents(copied)
    for more in ((), ("--overwrite",)):
        assert "which a run would write over" in refusal([*MAIN, *flags(data, copied, *more)])
    assert contents(copied) == before


@pytest.mark.parametrize("name", ["log.txt", "0003_adv_image.png", f"{ANALYSIS}/losses.png"])
def test_a_users_own_file_is_not_written_over(tmp_path, name):
    def check():
        check_folder(tmp_path, {}, own_files(Layout(tmp_path, 4), Options().model_name))

    check()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds '{name}', which a run would write over"):
        check()
    (tmp_path / "run.json").write_text("{}")  # then that answers
    check()


def test_starting_over_with_more_images_does_not_write_over_a_users_file(data, copied):
    (copied / "0002_adv_image.png").unlink()
    configuration = json.loads((copied / "run.json").read_text())
    configuration["images"] = configuration["images"][:2]
    (copied / "run.json").write_text(json.dumps(configuration))
    (copied / "0002_adv_image.png").write_text("mine")
    assert "which a run would write over" in refusal([*MAIN, *flags(data, copied, "--overwrite")])
    assert (copied / "0002_adv_image.png").read_text() == "mine"


def test_a_comparison_does_not_write_over_a_run(data, copied):
    refused = refusal([*COMPARE, *flags(data, copied, "--modes", "uniform,fixed")])
    assert "it was of an attack and is of a comparison" in refused


def test_results_are_not_attacked_again(data, copied, tmp_path):
    refused = refusal([*MAIN, *flags(data, tmp_path / "new", "--images_root", copied)])
    assert "is the folder of a run" in refused and "--is_test" in refused
    assert not (tmp_path / "new").exists()


def judging(folder, out, more="") -> list[str]:
    command = f"--is_test --images_root {folder} --save_dir {out} --transfer_models= {more}"
    return [*MAIN, *command.split()]


def test_judging_a_folder_loses_nothing_in_it(copied):
    before = contents(copied)
    succeed(judging(copied, copied))
    after = contents(copied)
    assert before.items() <= after.items() and "evaluation.json" in after
    succeed(judging(copied, copied))  # its own report is written anew


def test_reports_of_others_are_not_written_over_and_other_classes_not_judged(copied, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "evaluation.txt").write_text("mine")
    refused = refusal(judging(copied, tmp_path / "mine"))
    assert "evaluation.txt', which a run would write over" in refused
    (tmp_path / "names.txt").write_text("\n".join(f"class {chr(97 + k % 26)}{k}x" for k in range(1000)))
    refused = refusal(judging(copied, tmp_path / "judged", f"--captions {tmp_path}/names.txt"))
    assert "was of other classes than these 1000" in refused


@pytest.mark.parametrize("flag", ["label_path", "captions", "mask_root"])
def test_what_the_command_names_is_not_written_over(tmp_path, flag):
    (tmp_path / "out").mkdir()
    named = tmp_path / "out/log.txt"
    with pytest.raises(InputError, match=f"--{flag}: .*log.txt' lies in --save_dir"):
        check_inputs(Options(save_dir=tmp_path / "out", **{flag: named}))
    check_inputs(Options(save_dir=tmp_path / "other", **{flag: named}))


def test_long_names_of_surrogates_are_shortened_and_stay_apart(tmp_path):
    long = [f"timm:hf-hub:somebody/{'a very long name '.replace(' ', '_') * 6}{k}" for k in range(3)]
    names = {joined_names(some) for some in (long, long[::-1], long[:2], long[:1])}
    assert len(names) == 4 and all(len(name.encode()) <= 150 for name in names)
    assert joined_names(["timm:resnet50.tv_in1k", "hf:a/b"]) == "timm_resnet50.tv_in1k+b"
    layout = Layout(tmp_path, 50_000)
    path = temporary_name(layout.file(49_999, f"diff_{joined_names(long)}_image_ATKSuccess.png"))
    path.parent.mkdir()
    path.write_text("x")  # no name is too long
