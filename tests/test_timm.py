"""timm and torchvision as they are installed beside a CPU-only torch: torchvision's operators are of another
build, so that it cannot be imported as it is.

They are looked for in `.timm`, since they must not stand in the way of the other tests:
`pip install --no-deps --target .timm timm torchvision`.
"""

import os
import subprocess
import sys

import pytest
from conftest import MAIN, ROOT, flags, run

TIMM = ROOT / ".timm"
needs_timm = pytest.mark.skipif(not TIMM.is_dir(), reason="timm and torchvision are not in .timm")

FUNCTION = """
import sys
import diffattack.common.torchvision
sys.path.insert(0, "tests")
import test_timm
getattr(test_timm, sys.argv[1])(*sys.argv[2:])
"""


def in_a_process(*command) -> str:
    path = f"{TIMM}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    how = dict(cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    result = subprocess.run(list(map(str, command)), **how)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result.stdout


# ---------------------------------------------------------------- what runs in a process of its own


def compare_preprocessing() -> None:
    """Each alias against timm's own transform on the demo's photographs; differences in normalised units, of
    which 8-bit rounding alone is 0.009.
    """
    import timm
    import torch
    from PIL import Image

    from diffattack.classifiers.preprocessing import from_timm
    from diffattack.classifiers.registry import ALIASES
    from diffattack.data.images import to_tensor

    import numpy as np  # isort: skip

    names = [source.removeprefix("timm:") for source, _ in ALIASES.values()]
    assert set(names) <= set(timm.list_models(pretrained=True))
    largest = {}
    for name in names:
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        transform = timm.data.create_transform(**config, is_training=False)
        for path in sorted((ROOT / "demo/images").iterdir())[:4]:
            for side in (224, 299):
                image = Image.open(path).convert("RGB").resize((side, side), Image.LANCZOS)
                found = from_timm(torch.nn.Identity(), config).preprocess(to_tensor(np.asarray(image)))[0]
                difference = (found - transform(image)).abs().max().item()
                largest[name] = max(largest.get(name, 0), difference)
    for name, difference in largest.items():
        print(name, f"{difference:.4f}")
        assert difference <= 0.02, (name, difference)


def load_folders(folder: str) -> None:
    """A folder that transformers saved of a timm model, and one that timm saved."""
    import timm
    import torch
    from timm.models import save_for_hf
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    from diffattack.classifiers.registry import load_classifier

    torch.manual_seed(0)
    network = timm.create_model("resnet18", pretrained=False, num_classes=10).eval()
    save_for_hf(network, f"{folder}/timm")
    config = TimmWrapperConfig(
        architecture="resnet18", num_labels=10, pretrained_cfg=network.pretrained_cfg, do_pooling=True
    )
    wrapped = TimmWrapperForImageClassification(config)
    wrapped.timm_model.load_state_dict(network.state_dict())
    wrapped.save_pretrained(f"{folder}/transformers")
    images = torch.rand(2, 3, 224, 224)
    ours = [
        load_classifier(name, 10, 224, attacked=True)(images).detach()
        for name in (f"timm:local-dir:{folder}/timm", f"hf:{folder}/transformers")
    ]
    assert torch.allclose(ours[0], ours[1], atol=1e-5) and ours[0].std() > 0


# ---------------------------------------------------------------- the tests


@needs_timm
@pytest.mark.nightly
def test_every_alias_exists_and_its_preprocessing_is_timms_own():
    told = in_a_process(sys.executable, "-c", FUNCTION, compare_preprocessing.__name__)
    assert len(told.splitlines()) == 13


@needs_timm
@pytest.mark.nightly
def test_folders_of_timm_models_and_a_run_beside_it(data, tmp_path):
    in_a_process(sys.executable, "-c", FUNCTION, load_folders.__name__, tmp_path / "models")
    in_a_process(*MAIN, *flags(data, tmp_path / "out", "--limit", "1"))


def test_without_timm_its_classifiers_are_refused_in_one_line(data, tmp_path):
    result = run([*MAIN, *flags(data, tmp_path, "--model_name", "resnet")])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "expected timm and torchvision installed" in result.stderr
