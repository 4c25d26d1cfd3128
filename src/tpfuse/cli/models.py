"""Finding a model, checking it against the number of ranks before any rank starts, and loading one rank's shard of it."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tpfuse.cli.inputs import HF, BadInput, require, writable
from tpfuse.config import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

WHOLE = "tpfuse_whole"  # the style of what a plan leaves whole on every rank
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model on disk: a Hugging Face folder, and the GGUF file in it if the weights are there."""

    folder: Path
    gguf: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / (self.gguf or "")

    @property
    def keywords(self) -> dict[str, Any]:
        """What transformers' from_pretrained takes beside the folder."""
        return {"gguf_file": self.gguf} if self.gguf else {}

    def weights(self) -> list[Path]:
        if self.gguf:
            return [self.path]
        return sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("pytorch_model*.bin")])


def fingerprint(folder: Path) -> str:
    """Equal for equal models: the configuration, and the names and sizes of the weight files."""
    files = [(p.name, p.stat().st_size) for p in Source(folder).weights()]
    return hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(files).encode()).hexdigest()[:16]


def locate(path: str) -> Source:
    """The model at `path`.  BadInput where there is none, and where what reads it is not installed."""
    require("Hugging Face models", *HF, extra="hf")
    where = Path(path).expanduser().resolve()
    if not where.exists():
        raise BadInput(f"{path}: no such file or folder (a model is a Hugging Face folder or a GGUF file on this machine)")
    if where.is_file():
        if where.suffix != ".gguf":
            raise BadInput(f"{path}: not a GGUF file; for other formats name the folder that holds config.json")
        require("GGUF files", "gguf", extra="gguf")
        return Source(where.parent, where.name)
    if (where / "config.json").is_file():
        return Source(where)
    found = sorted(where.glob("*.gguf"))
    if len(found) == 1:
        return locate(str(found[0]))
    if found:
        raise BadInput(f"{path}: several GGUF files, name one: {', '.join(p.name for p in found)}")
    raise BadInput(f"{path}: no model here: neither config.json nor a GGUF file")


def check_files(source: Source) -> None:
    """BadInput where a weight file is missing, truncated or damaged."""
    if source.gguf:
        return _check_gguf(source.path)
    index = source.folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{index}: truncated or damaged: no list of weight files") from error
        missing = sorted(n for n in named if not (source.folder / n).is_file())
        if missing:
            raise BadInput(f"{source.folder}: weight files are missing: {', '.join(missing)}")
    if not source.weights():
        raise BadInput(f"{source.folder}: config.json, but no weights (*.safetensors, pytorch_model*.bin)")
    for path in source.weights():
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif not zipfile.is_zipfile(path):
            raise BadInput(f"{path}: truncated or damaged: not a torch checkpoint")


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            header = json.loads(file.read(length)) if length <= size - 8 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: truncated or damaged: no safetensors header")
    needed = 8 + length + max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    if size < needed:
        raise BadInput(f"{path}: truncated: {size:,} bytes of {needed:,}")


def _check_gguf(path: Path) -> None:
    import gguf

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput(f"{path}: not a GGUF file")
    try:
        gguf.GGUFReader(path)
    except Exception as error:  # the reader trips over missing bytes in as many ways as there are fields
        raise BadInput(f"{path}: truncated or damaged: {error}") from error


def read_config(source: Source) -> PreTrainedConfig:
    """The configuration.  BadInput for an architecture that transformers does not know or cannot shard."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    try:
        config = AutoConfig.from_pretrained(source.folder, **source.keywords)
    except Exception as error:
        raise BadInput(f"{source.path}: transformers {__version__} cannot read this model: {_in_short(error)}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BadInput(f"architecture {config.model_type!r} is not a causal language model that transformers {__version__} has")
    return config


def check_ranks(config: PreTrainedConfig, tp: int) -> None:
    """BadInput where heads or sharded widths do not divide by `tp`; it says which, and which `tp` would work."""
    if tp < 1:
        raise BadInput(f"--tp {tp}: at least one rank is needed")
    text = config.get_text_config()
    heads = {"attention heads": text.num_attention_heads, "key/value heads": getattr(text, "num_key_value_heads", None)}
    heads = {name: size for name, size in heads.items() if size}
    model = _outline(config)
    plan = getattr(model, "tp_plan", None)
    if tp > 1 and not plan:
        raise BadInput(f"architecture {config.model_type!r}: its model has no tensor-parallel plan in transformers")
    widths = _sharded_widths(model, dict(plan or {}))
    # Wrong heads make wrong widths, which then say nothing new.
    wrong = [f"{n} {name}" for name, n in heads.items() if n % tp] or [f"{n} {name}" for name, n in widths.items() if n % tp]
    if wrong:
        sizes = [*heads.values(), *widths.values()]
        works = [n for n in range(1, text.num_attention_heads + 1) if not any(size % n for size in sizes)]
        raise BadInput(f"--tp {tp} does not divide {', '.join(wrong)}; --tp {' or '.join(map(str, works))} would work")


def check_prompt(folder: Path, config: PreTrainedConfig, prompt: str, new: int) -> None:
    """BadInput for a prompt without tokens, and where it and `new` tokens more are beyond the model's positions."""
    try:
        count = len(load_tokenizer(folder)(prompt)["input_ids"])
    except Exception as error:
        raise BadInput(f"{folder}: no tokenizer that can be read: {_in_short(error)}") from error
    if not count:
        raise BadInput("--prompt: it has no tokens, and this model's tokenizer adds none: give it a word")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and count + new > positions:
        raise BadInput(f"--prompt of {count} tokens and --max-new-tokens {new}: more than the model's {positions} positions")


def _outline(config: PreTrainedConfig, **keywords: Any) -> Any:
    """The whole model on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **keywords)


def _sharded_widths(model: nn.Module, plan: dict[str, str]) -> dict[str, int]:
    """Widths that the plan cuts, by the plan's entry.  Embeddings and heads may be cut unevenly."""
    widths = {}
    for name, parameter in model.named_parameters():
        module = re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])
        style = plan.get(module, "")
        if parameter.ndim < 2 or "gather" in style or "embedding" in style:
            continue
        if "colwise" in style:
            widths[f"columns of {module}"] = parameter.shape[-2]
        elif "rowwise" in style:
            widths[f"rows of {module}"] = parameter.shape[-1]
    return widths


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """The model's own plan, in which embeddings stay whole on every rank and no entry asks for gradients.

    A vocabulary-parallel embedding puts the rank's own offsets into the graph, so that no two ranks share a compiled artifact,
    and does not recompile for one token.  A head that shares the embedding's weight stays whole with it.  Of a norm whose
    gradient is summed over the ranks some releases of transformers make a module hook, which cannot be traced.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

    untouched: Any = TensorParallelLayer()  # transformers 5.23 has a style of this class, 5.17 none
    ALL_PARALLEL_STYLES.register(WHOLE, untouched)
    own = dict(model.tp_plan)
    tied = ("lm_head",) if getattr(model.config.get_text_config(), "tie_word_embeddings", False) else ()
    return {n: WHOLE if n in tied or "embedding" in style or "grad" in style else style for n, style in own.items()}


def load(folder: Path, tp: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """One rank's shard, by the model's own plan, its parameters as plain tensors.  The process group must be there."""
    from transformers import AutoConfig

    keywords: dict[str, Any] = {"dtype": dtype}
    if tp > 1:
        from transformers.distributed import DistributedConfig

        plan = plan_of(_outline(AutoConfig.from_pretrained(folder)))
        keywords["distributed_config"] = DistributedConfig(tp_size=tp, tp_plan=plan)
    model = _filled(Source(folder), **keywords).eval().requires_grad_(False)
    localise(model)
    return model.to(device)


def _filled(source: Source, **keywords: Any) -> Any:
    """The model with its weights.  BadInput where files lack one, of which transformers would make random numbers."""
    from transformers import AutoModelForCausalLM

    keywords |= {**source.keywords, "output_loading_info": True, "ignore_mismatched_sizes": True}
    found: Any = AutoModelForCausalLM.from_pretrained(source.folder, **keywords)
    model, info = found
    wrong = [f"{name} has another size" for name, *_ in sorted(info["mismatched_keys"])]  # sizes told are sometimes a shard's
    wrong += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadInput(f"{source.path}: the weights are not those of config.json: {', '.join(wrong[:3])}{more}")
    return model


def build(config: PreTrainedConfig, tp: int, dtype: torch.dtype) -> PreTrainedModel:
    """Rank 0's shard without weights: tensors on the meta device.  The process group, real or fake, must be there."""
    # A plan names the weights of embedding and head both; a model that is made whole has tied them to one already.
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = untied.get_text_config().tie_word_embeddings = False
    model = _outline(untied, dtype=dtype).eval().requires_grad_(False)
    if tp > 1:
        from transformers.distributed import DistributedConfig

        os.environ.setdefault("LOCAL_RANK", "0")  # transformers 5.17 reads it where there is a GPU
        wanted, _, mesh = model.prepare_distribute_model(DistributedConfig(tp_size=tp, tp_plan=plan_of(_outline(config))))
        model = model.maybe_distribute_model(model, wanted, mesh)
        localise(model)
    return model


def localise(model: nn.Module) -> None:
    """Replace DTensor parameters by this rank's part.  The forward hooks of the plan work on those at inference anyway, and
    without them a graph holds no mesh and is traced in two thirds of the time."""
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, name, nn.Parameter(parameter.to_local(), requires_grad=False))


def quiet() -> None:
    """Models are local, and the command line has bars and messages of its own."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for name in ("torchao", "torch.utils._pytree"):  # torchao, where installed, complains of kernels it does not need
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as messages

    messages.set_verbosity_error()
    messages.disable_progress_bar()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def converted(source: Source, dtype: torch.dtype) -> Path:
    """Where `dequantised` keeps the folder it makes, in the user's cache folder; it may not be there yet."""
    assert source.gguf
    path = source.path
    stat = path.stat()
    key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns} {dtype}".encode()).hexdigest()[:12]
    return cache_folder() / "models" / f"{path.stem}-{key}"


def dequantised(source: Source, dtype: torch.dtype) -> Path:
    """A Hugging Face folder with the weights of a GGUF file in `dtype`, made once.

    Sharding while loading needs such a folder.  Processes that ask at the same time make it once.
    """
    from filelock import FileLock

    target = converted(source, dtype)
    if target.is_dir():  # whole: a folder gets this name last; the cache may be for reading only
        return target
    try:
        writable(target.with_suffix(".lock"))
    except BadInput as error:
        raise BadInput(f"{error}; converted weights are kept there, TPFUSE_CACHE names another folder") from error
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            part = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                _convert(source, dtype, part)
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


def _convert(source: Source, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoTokenizer

    model = _filled(source, dtype=dtype)
    # The weights are dequantised by now; what remembers that they were quantised refuses to save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.folder, **source.keywords).save_pretrained(folder)


def _in_short(error: BaseException) -> str:
    """The first sentence of an error; what follows a colon belongs to it."""
    lines = str(error).split("\n")
    told = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1]).strip()
    return told or type(error).__name__
