"""A grown transformers model saves itself with its children, in the way that library has for models with own code.

`save_pretrained` writes the model, and beside it `grown.py` with the children and a class of the model's own; its
`from_pretrained(folder, trust_remote_code=True)` needs transformers and torch, nothing of Esper.
"""

import json
from functools import partial
from inspect import getmodule
from pathlib import Path
from typing import Any

from torch import nn

from esper.leyline.errors import ConfigError
from esper.tolaria.plain_code import code_of
from esper.tolaria.planted import Grown, Planted

_CODE = '''

# --- the model's own class ---


class {grown_config}({config}):
    """The model's settings, under a name that a reader without this file does not mistake for its own."""

    model_type = "{model_type}"


class {grown_model}({model}):
    """A {model} with what grew in it."""

    config_class = {grown_config}
{keep}
    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        grow(self)
'''


def keep_children_when_saved(model: nn.Module) -> None:
    """Let the `save_pretrained` of a transformers model write the children too; any other model is left as it is."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config") and _children(model):
        vars(model)["save_pretrained"] = partial(_save, model)


def _children(model: nn.Module) -> list[Grown]:
    return [module for module in model.modules() if isinstance(module, Grown)]


def _save(model: nn.Module, save_directory: str | Path, **options: Any) -> None:
    """Write the model, `grown.py`, and a config that names it.

    Raises:
        ConfigError: `push_to_hub` was asked for, or the model's class cannot be imported.
    """
    if options.get("push_to_hub"):
        raise ConfigError("a grown model is saved first: save_pretrained(folder), then upload the folder.")
    code, names = _code(model)
    save: Any = partial(type(model).save_pretrained, model)  # type: ignore[attr-defined]
    save(save_directory, **options)
    folder = Path(save_directory)
    if options.get("is_main_process", True):
        (folder / "grown.py").write_text(code, encoding="utf-8")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings |= {
            "model_type": names["model_type"],
            "architectures": [names["grown_model"]],
            "auto_map": {"AutoConfig": f"grown.{names['grown_config']}"}
            | {auto: f"grown.{names['grown_model']}" for auto in _auto_classes(model)},
        }
        (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _code(model: Any) -> tuple[str, dict[str, str]]:
    model_class, config_class = type(model), type(model.config)
    names = {
        "model": model_class.__name__,
        "config": config_class.__name__,
        "grown_model": f"Grown{model_class.__name__}",
        "grown_config": f"Grown{config_class.__name__}",
        "model_type": f"grown_{model.config.model_type}",
        "keep": _keep(model),
    }
    imports = "".join(f"from {_home(cls)} import {cls.__name__}\n" for cls in (config_class, model_class))
    source = code_of(model).replace("from torch import Tensor, nn\n", f"from torch import Tensor, nn\n{imports}", 1)
    return source + _CODE.format(**names), names


def _home(cls: type) -> str:
    """Return the public module of a class."""
    module = getmodule(cls)
    if module is None or module.__name__ == "__main__":
        raise ConfigError(f"{cls.__name__} is defined in the script itself; move it to a module that can be imported.")
    top = module.__name__.partition(".")[0]
    return top if top == "transformers" else module.__name__


def _keep(model: nn.Module) -> str:
    """Return the setting that keeps children in float32 beside a host of lower precision."""
    dtypes = {str(p.dtype) for m in model.modules() if isinstance(m, Planted) for p in m.parameters()}
    host = str(getattr(model, "dtype", ""))
    return (
        '    _keep_in_fp32_modules_strict = {"grown"}\n' if dtypes == {"torch.float32"} and host not in dtypes else ""
    )


def _auto_classes(model: Any) -> list[str]:
    """Return the transformers library's `AutoModel...` classes that load this model."""
    from transformers.models.auto import modeling_auto

    found = ["AutoModel"]
    for name in sorted(dir(modeling_auto)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
                found.append(name)
    return list(dict.fromkeys(found))
