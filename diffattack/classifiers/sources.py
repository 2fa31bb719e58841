"""Classifiers that come from elsewhere: timm, transformers, exported programs, and a user's own code.

Each function returns a module that maps images `(B, 3, H, W)` in [0, 1] to logits, as its authors would call
it; what is checked of all of them alike is in registry.py.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from diffattack import METHOD, ROOT
from diffattack.classifiers.preprocessing import Preprocessed, from_processor, from_timm
from diffattack.common.checkpoints import check_loaded, check_weights, stay_offline_if_out_of_reach
from diffattack.common.errors import ClassifierError, one_line
from diffattack.data.classes import IMAGENET_CLASSES


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
    classifier = from_timm(network, timm.data.resolve_model_data_config(network))
    classifier.class_names = names_of_timm(network)
    return classifier


def names_of_timm(network: torch.nn.Module) -> tuple[str, ...] | None:
    """The names that a model of timm has for its outputs, where it has some: those of its configuration,
    which are often WordNet ids, or those of ImageNet.
    """
    configuration = network.pretrained_cfg
    if configuration.get("label_names"):
        return tuple(map(str, configuration["label_names"]))
    # timm's own way to say what weights were trained on is the end of their tag
    return IMAGENET_CLASSES if str(configuration.get("tag")).endswith("in1k") else None


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
            check_weights(Path(name), "model")
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
    if network.config.problem_type == "regression":
        raise ClassifierError(
            f"classifier 'hf:{name}' says that it is a regression, whose outputs are no classes; give a "
            f"classifier"
        )
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


class Script(torch.nn.Module):
    """A program of TorchScript, which bears no hooks itself."""

    def __init__(self, program: torch.jit.ScriptModule):
        super().__init__()
        self.program = program

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.program(images)


def program_classifier(path: str) -> torch.nn.Module:
    """A program that maps images `(B, 3, H, W)` in [0, 1] to logits."""
    if not Path(path).is_file():
        raise ClassifierError(f"classifier {path!r}: there is no such file")
    try:
        if path.endswith(".pt2"):
            return Program(torch.export.load(path))
        return Script(torch.jit.load(path, map_location="cpu"))
    except Exception as error:  # both raise whatever their file made them
        kind = "torch.export.save" if path.endswith(".pt2") else "torch.jit.save"
        raise ClassifierError(
            f"classifier {path!r} cannot be loaded ({one_line(error)}); expected a file that {kind} wrote"
        ) from None


def load_function(
    shown: str, path: str, function: str, error: type[ValueError] = ClassifierError
) -> tuple[Callable, UserFile]:
    """A function in a file of the user's, and where it is to be called.

    Args:
        shown: what a message calls it.
        error: what is raised where there is none, or the file cannot be executed.
    """
    if not Path(path).is_file():
        raise error(f"{shown}: there is no file {path!r}")
    place = UserFile(Path(path).resolve())
    try:
        with place.entered():
            module = place.execute()
    except (Exception, SystemExit) as raised:  # the code may raise whatever it likes
        raise error(
            f"{shown} raises {type(raised).__name__} when it is loaded ({one_line(raised)})"
        ) from None
    if not callable(getattr(module, function, None)):
        raise error(f"{shown}: the file has no function {function!r}")
    return getattr(module, function), place


def code_classifier(path: str, function: str) -> torch.nn.Module:
    """What a function in a file of the user's returns; weights that it draws are the same each time."""
    name = f"{path}:{function}"
    make, place = load_function(f"classifier {name!r}", path, function)
    try:
        with place.entered(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            classifier = make()
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
    return UserCode(classifier, place)


class UserCode(torch.nn.Module):
    """A classifier that code of the user's made, called where its own modules are in place, since it may
    import some only then.
    """

    def __init__(self, classifier: torch.nn.Module, place: UserFile):
        super().__init__()
        self.classifier, self.place = classifier, place
        self.class_names = getattr(classifier, "class_names", None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with self.place.entered():
            return self.classifier(images)


class UserFile:
    """A file of the user's, loaded by its path and run as `python FILE` would run it: what lies beside it can
    be imported by its name. Two files that have helpers of one name have each its own.
    """

    def __init__(self, file: Path):
        self.file = file
        self.modules: dict[str, object] = {}  # the helpers that have been imported

    def execute(self) -> object:
        """The file's module."""
        beside = [name for name in METHOD if (self.file.parent / f"{name}.py").is_file()]
        if beside and self.file.parent != ROOT:
            raise ImportError(f"{beside[0]}.py beside it has the name of a module of ours; move one of them")
        specification = importlib.util.spec_from_file_location(f"{self.file.stem} of a user", self.file)
        module = importlib.util.module_from_spec(specification)
        self.modules[specification.name] = sys.modules[specification.name] = module  # for dataclasses
        specification.loader.exec_module(module)
        return module

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, names mean what they mean to the user's file."""
        path = sys.path
        sys.path = [str(self.file.parent), *path]
        sys.modules.update(self.modules)
        count = len(sys.modules)
        try:
            yield
        finally:
            sys.path = path
            # of thousands of modules, hundreds of times an image, those that are new alone
            new = list(sys.modules)[count:] if len(sys.modules) > count else []
            for name in [*self.modules, *filter(self.lies_beside, new)]:
                self.modules[name] = sys.modules.pop(name, self.modules.get(name))

    def lies_beside(self, name: str) -> bool:
        """Whether a module, or the package that it lies in, is one of those beside the file."""
        top, found = name.partition(".")[0], getattr(sys.modules[name], "__spec__", None)
        folders = getattr(found, "submodule_search_locations", None) or ()
        return top not in ("diffattack", *METHOD) and str(
            next(iter(folders), getattr(found, "origin", None))
        ).startswith(str(self.file.parent / top))
