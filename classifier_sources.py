"""Classifiers that come from elsewhere: timm, transformers, exported programs, and a user's own code.

Each function returns a module that maps images `(B, 3, H, W)` in [0, 1] to logits, as its authors would call
it; what is checked of all of them alike is in classifiers.py.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpoints import check_files, check_loaded, stay_offline_if_out_of_reach
from notes import one_line
from preprocessing import ClassifierError, Preprocessed, from_processor, from_timm

HERE = Path(__file__).resolve().parent


def timm_classifier(name: str) -> Preprocessed:
    """A model of timm with its own weights and the evaluation transform of its `pretrained_cfg`."""
    try:
        import timm
    except (ImportError, RuntimeError, OSError) as error:
        raise ClassifierError(
            f"classifier 'timm:{name}' needs timm and torchvision, and they cannot be imported "
            f"({one_line(error)}); "
            "pip install timm torchvision, or give a classifier of another form"
        ) from None
    elsewhere = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if (
        not elsewhere
        and name not in timm.list_models(pretrained=True)
        and name.split(".")[0] not in timm.list_models()
    ):
        raise ClassifierError(
            f'timm knows no model {name!r}; python -c "import timm; '
            f"print(timm.list_models('*{name.split('.')[0][:6]}*', pretrained=True))\" lists some"
        )
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm passes on what the hub, the loader or a configuration raises
        raise ClassifierError(
            f"the weights of 'timm:{name}' are not here and cannot be fetched ({one_line(error)}); give a "
            f"local folder in transformers format as hf:FOLDER, or a program FILE.pt2"
        ) from None
    return from_timm(network, timm.data.resolve_model_data_config(network))


def hugging_face_classifier(name: str) -> torch.nn.Module:
    """An image classifier in transformers format, from a folder or the hub, with the preprocessing of its own
    image processor.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not Path(name).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        stay_offline_if_out_of_reach()
    elif not Path(name).is_dir():
        raise ClassifierError(
            f"classifier 'hf:{name}': there is no folder {name!r}; give hf:FOLDER with a folder in "
            f"transformers format, or hf:ORG/NAME"
        )
    try:
        if Path(name).is_dir():
            check_files(Path(name))
        network, info = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        check_loaded(info)
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        classifier = (
            from_timm(Logits(network), processor.data_config)
            if type(processor).__name__ == "TimmWrapperImageProcessor"
            else from_processor(Logits(network), processor, name)
        )
    except ClassifierError:
        raise
    # whatever a configuration makes the loaders stumble over, which is not foreseeable
    except Exception as error:
        where = (
            "cannot be loaded"
            if Path(name).is_dir()
            else "is no folder here, and the model hub did not give it"
        )
        raise ClassifierError(
            f"classifier 'hf:{name}' {where} ({one_line(error)}); give a folder that holds the model in "
            f"transformers format with safetensors weights"
        ) from None
    labels = [network.config.id2label[k] for k in sorted(network.config.id2label)]
    classifier.class_names = None if labels[0] == "LABEL_0" else tuple(labels)
    return classifier


class Logits(torch.nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).logits


class Program(torch.nn.Module):
    """A program of torch.export, which is moved by a pass of its own and knows neither eval mode nor
    hooks.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        self.program, self.callables = program, {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device not in self.callables:
            from torch.export.passes import move_to_device_pass

            self.callables[images.device] = move_to_device_pass(self.program, str(images.device)).module()
        return self.callables[images.device](images)


def program_classifier(path: str) -> torch.nn.Module:
    """A program that maps images `(B, 3, H, W)` in [0, 1] to logits."""
    if not Path(path).is_file():
        raise ClassifierError(f"classifier {path!r}: there is no such file")
    try:
        return (
            Program(torch.export.load(path))
            if path.endswith(".pt2")
            else torch.jit.load(path, map_location="cpu")
        )
    except Exception as error:  # both raise whatever their file made them
        kind = "torch.export.save" if path.endswith(".pt2") else "torch.jit.save"
        raise ClassifierError(
            f"classifier {path!r} cannot be loaded ({one_line(error)}); expected a file that {kind} wrote"
        ) from None


def code_classifier(path: str, function: str) -> torch.nn.Module:
    """What a function in a file of the user's returns."""
    name = f"{path}:{function}"
    if not Path(path).is_file():
        raise ClassifierError(f"classifier {name!r}: there is no file {path!r}")
    try:
        with as_a_script(Path(path).resolve()) as module:
            if not callable(getattr(module, function, None)):
                raise ClassifierError(f"classifier {name!r}: the file has no function {function!r}")
            classifier = getattr(module, function)()
    except ClassifierError:
        raise
    except (Exception, SystemExit) as error:  # the code may raise whatever it likes
        hint = (
            "; its keys begin with 'module.', as DataParallel saves them: remove that before loading them"
            if "module." in str(error) and "state_dict" in str(error)
            else ""
        )
        raise ClassifierError(
            f"classifier {name!r} raises {type(error).__name__} when it is loaded ({one_line(error)}){hint}"
        ) from None
    if isinstance(classifier, torch.nn.DataParallel):
        classifier = classifier.module
    if not isinstance(classifier, torch.nn.Module):
        raise ClassifierError(
            f"classifier {name!r}: the function returned {type(classifier).__name__}; expected a "
            f"torch.nn.Module that maps images (B, 3, H, W) in [0, 1] to logits"
        )
    return classifier


@contextmanager
def as_a_script(path: Path) -> Iterator[object]:
    """The module of a file, executed as `python FILE` would: modules beside it come before all others, also
    before those of this project that have their names. What this project has imported stays its own.
    """
    ours = {
        name: module for name, module in sys.modules.items() if name != "__main__" and is_of(module, HERE)
    }
    for name in ours:
        del sys.modules[name]
    before = set(sys.modules)
    sys.path.insert(0, str(path.parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        for name in set(sys.modules) - before:
            # theirs stay under their names, unless these are names of ours
            if name.split(".")[0] in ours or (HERE / f"{name.split('.')[0]}.py").exists():
                del sys.modules[name]
        sys.modules.update(ours)
        if str(path.parent) not in sys.path:  # for what is imported when the classifier is called
            sys.path.append(str(path.parent))


def is_of(module: object, folder: Path) -> bool:
    """Whether a module is a file of the folder itself."""
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == folder
