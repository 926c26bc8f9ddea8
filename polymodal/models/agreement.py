"""Numbers that two files of one checkpoint must share: tokens and rows of the embedding, ids of special
tokens, sizes of processors and of the tower. The libraries compare none of them."""

from __future__ import annotations

from typing import Any

from polymodal.core.errors import PolymodalError

SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
"""Of an image or video processor, and the same of config.vision_config."""


def require_tokens(tokenizer: Any, config: Any, directory: object) -> None:
    """Raises PolymodalError for tokens, and for special ids of the config, beyond the embedding's rows."""
    text = config.get_text_config(decoder=True)
    rows = getattr(text, "vocab_size", None)
    if not isinstance(rows, int):
        return
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if last is not None and vocabulary[last] >= rows:
        raise PolymodalError(
            f"{directory}: the tokenizer's vocabulary has {vocabulary[last] + 1} tokens (the last: {last}), "
            f"the model's embedding has {rows} rows.",
            "Grow it and save the model (transformers' "
            f"model.resize_token_embeddings({vocabulary[last] + 1})), or copy this very model's tokenizer "
            "files.",
        )
    for key, value in {**text.to_dict(), **config.to_dict()}.items():
        ids = value if isinstance(value, list) else [value]
        beyond = [i for i in ids if isinstance(i, int) and i >= rows]
        if key.endswith(("_token_id", "_token_index")) and beyond:
            raise PolymodalError(
                f"{directory}: {key} = {beyond[0]} of config.json is beyond the embedding's {rows} rows.",
                "Copy config.json again from the checkpoint's origin.",
            )


def require(media: Any, config: Any) -> None:
    """Of a media processor and the config that it feeds: `require_tokens`, placeholders and sizes. Raises
    PolymodalError."""
    tokenizer, directory = media.tokenizer, media.directory
    require_tokens(tokenizer, config, directory)
    vocabulary = tokenizer.get_vocab()
    for kind, shown in media.reads.items():
        expected = getattr(config, f"{kind}_token_id", None)
        here = [token for token, i in vocabulary.items() if i == expected]
        if expected is not None and not any(token in shown for token in here):
            raise PolymodalError(
                f"{directory}: {kind}_token_id = {expected} of config.json is the token "
                f"{here[0] if here else 'of no name'} of the tokenizer, which shows {kind}s as {shown}.",
                "Copy config.json and the tokenizer files again, both of this very model.",
            )
    vision = getattr(config, "vision_config", None)
    for kind, processor in getattr(media, "processors", {}).items():
        for key, name in SIZES.items():
            one, two = getattr(processor, key, None), getattr(vision, name, None)
            if isinstance(one, int) and isinstance(two, int) and one != two:
                raise PolymodalError(
                    f"{directory}: {key} = {one} of the {kind} processor, {name} = {two} of the model's "
                    "vision_config.",
                    "Copy the processor files and config.json again, both of this very model.",
                )
