"""A streamed answer to one prompt."""

from __future__ import annotations

import time

from .errors import DemoError
from .runtime import decode, paged_cache, prefill
from .types import Model, Tokenizer


def answer(
    model: Model, tokenizer: Tokenizer, weights: str, prompt: str,
    max_new_tokens: int,
) -> None:  # fmt: skip
    """Print the model's greedy answer to ``prompt`` as it comes, then how fast it came."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )["input_ids"][0].to(model.device)  # fmt: skip
    room = model.config.max_position_embeddings - max_new_tokens
    if len(ids) > room:
        raise DemoError(
            f"demo: --prompt: expected at most {room} tokens beside --max-new-tokens "
            f"{max_new_tokens}, got {len(ids)}. The model reads "
            f"{model.config.max_position_embeddings} tokens in all."
        )
    cache = paged_cache(model, weights, len(ids) + max_new_tokens)
    print(f"\n> {prompt}\n")
    start = time.perf_counter()
    tokens = [prefill(model, cache, ids)]
    first = time.perf_counter()
    stream, shown = decode(model, cache, tokens[0]), ""
    while tokens[-1] != tokenizer.eos_token_id:
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
        if len(tokens) == max_new_tokens:
            print(" ...", end="")
            break
        tokens.append(next(stream))
    seconds = time.perf_counter() - first
    rate = f", {(len(tokens) - 1) / seconds:.1f} tokens/s" if len(tokens) > 1 else ""
    print(f"\n\n[{len(ids)} tokens read in {first - start:.2f} s, {len(tokens)} written{rate}]\n")
