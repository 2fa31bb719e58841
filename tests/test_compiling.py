"""torch.compile, where a compiler is there and where none is."""

import shutil

import pytest
import torch
import torch._inductor.config
from test_picture_of_the_attack import build

from diffattack.common.errors import InputError
from diffattack.diffusion.pipeline import compile_blocks


def test_without_a_compiler_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "none"))}),
        pytest.raises(
            InputError, match="--compile: torch.compile cannot be used here .* leave --compile out"
        ) as e,
    ):
        compile_blocks([torch.nn.Linear(1, 1)])
    assert "\n" not in str(e.value)


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_compiled_block_attacks_as_an_eager_one_does(checkpoint, classifier, images, labels):
    options = dict(iterations=2, weight_mode="fixed", attack_through=(), contrast_limit=None)
    eager = build(checkpoint, classifier, **options)
    inversion = eager.invert(images[:1], labels[:1])
    expected = eager.attack(inversion)
    quick = build(checkpoint, classifier, **options)
    compile_blocks([quick.unet.mid_block.attentions[0]])
    torch._dynamo.utils.counters.clear()
    found = quick.attack(inversion)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for what is learnt from, and no more
    assert torch.allclose(found.adversarial, expected.adversarial, rtol=0, atol=1e-9)
    assert torch.allclose(found.record.gradient_norms, expected.record.gradient_norms, rtol=1e-6)
    assert torch.allclose(found.record.layer_losses, expected.record.layer_losses, rtol=1e-5, atol=1e-18)
