"""One model, ready to answer: batches of conversations in, texts out. The library generates; this room decides what.

What it decides: nothing is applied that was not asked for (a checkpoint's own sampling defaults are ignored, greedy
is the default), and the random draws of an answer depend on (seed, key of the question) alone, not on the batch it was
computed in, its order, or the number of processes. Sees the data room and errors; opening checkpoints is opening.py's
work.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.data import media as decoders
from polymodal.generate.sampling import Sampling

__all__ = ["Answer", "Conversation", "Engine", "Sampling"]

Conversation = Sequence[Message]
Asked = Callable[[], Conversation] | Conversation


@dataclass(frozen=True)
class Answer:
    """text: without special tokens. tokens: made, the end token included. finished: False when max_new_tokens cut it.

    scores: log-probability of each option, where options were compared.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finished: bool
    scores: tuple[float, ...] = ()


@dataclass
class _Prepared:
    """A conversation with decoded media, in the form the processor takes; length: of its media in tokens at first,
    of all of it once `Engine._measure` has counted its words."""

    index: int
    key: str
    messages: list[dict[str, Any]]
    videos: list[Any]  # VideoMetadata of each video
    words: list[str]
    length: int


class Engine:
    """A model with its processor on one device.

    model: a transformers model that generates. processor: its AutoProcessor, or a tokenizer for text-only models.
    image/video: how media are sized and sampled, as in the recipe; what is None stays as the checkpoint has it.
    name, identity: for reports, and to know later whether stored answers are this model's.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: torch.device | str | None = None,
        video: recipes.Video | None = None,
        template_kwargs: dict[str, Any] | None = None,
        name: str = "model",
        identity: str | None = None,
    ):
        if not hasattr(model, "generate"):
            raise PolymodalError(
                f"{type(model).__name__} cannot generate text.",
                "Give a checkpoint of a language or vision-language model.",
            )
        self.model, self.processor, self.name = model, processor, name
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.multimodal = self.tokenizer is not processor
        self.device = torch.device(device) if device is not None else next(model.parameters()).device
        self.video = video or recipes.Video()
        self.template_kwargs = template_kwargs or {}
        self._identity = identity
        if not getattr(processor, "chat_template", None) and not getattr(
            self.tokenizer, "chat_template", None
        ):
            raise PolymodalError(
                f"{name} has no chat template.",
                "Put a chat_template.jinja beside its tokenizer, or set data.chat_template in the recipe it was trained with.",
            )
        own = getattr(model, "generation_config", None)
        ends = [getattr(own, "eos_token_id", None), self.tokenizer.eos_token_id]
        self.ends = sorted(
            {
                e
                for group in ends
                if group is not None
                for e in (group if isinstance(group, list) else [group])
            }
        )
        pad = self.tokenizer.pad_token_id
        self.pad = pad if pad is not None else (self.ends[0] if self.ends else 0)

    @property
    def identity(self) -> str:
        """Changes when the weights do: given by who opened a checkpoint, else a digest of all parameters."""
        if self._identity is None:
            digest = hashlib.blake2b(digest_size=16)
            for name, p in sorted(self.model.named_parameters()):
                value = p.detach().double()
                digest.update(
                    f"{name} {tuple(p.shape)} {value.sum().item()!r} {value.abs().max().item() if p.numel() else 0!r}\n".encode()
                )
            return digest.hexdigest()
        return self._identity

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the weights decides an answer. JSON-able."""
        size = getattr(getattr(self.processor, "image_processor", None), "size", None)
        return {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "image_size": dict(size) if size is not None else None,
            "video": self.video.model_dump(),
            "template": {"kwargs": self.template_kwargs},
        }

    # ---------------------------------------------------------------- conversations -> tensors

    def _prepare(self, index: int, key: str, conversation: Conversation) -> _Prepared:
        """Decode media, lay the messages out for the template, and measure. Raises PolymodalError."""
        messages, videos, sizes, frames, words = [], [], [], [], []
        for message in conversation:
            parts: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, str):
                    parts.append({"type": "text", "text": part})
                    words.append(part)
                elif not self.multimodal:
                    raise PolymodalError(f"{self.name} reads text only, the question has {part.kind}s.")
                elif part.kind == "image":
                    picture = decoders.image(part.source)  # type: ignore[arg-type]
                    sizes.append((picture.height, picture.width))
                    parts.append({"type": "image", "image": picture})
                elif part.kind == "video":
                    clip, metadata = self._clip(part)
                    videos.append(metadata)
                    frames.append((clip.shape[0], clip.shape[2], clip.shape[3]))
                    parts.append({"type": "video", "video": clip})
                else:
                    raise PolymodalError(f"{self.name} does not hear {part.kind}.")
            words_only = (
                all(p["type"] == "text" for p in parts) and self._takes_strings
            )  # the form training gives it
            content: Any = "".join(p["text"] for p in parts) if words_only else parts
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if message.tool_calls:
                entry["tool_calls"] = list(message.tool_calls)
            if message.reasoning:
                entry["reasoning_content"] = message.reasoning
            messages.append(entry)
        return _Prepared(index, key, messages, videos, words, self._media_tokens(sizes, frames))

    def _measure(self, prepared: Sequence[_Prepared]) -> None:
        """Add the words' tokens to the lengths. Not in threads: a fast tokenizer must not be used by two at once."""
        texts = [text for p in prepared for text in p.words]
        counts = iter([len(ids) for ids in self.tokenizer(texts)["input_ids"]] if texts else ())
        for p in prepared:
            p.length += sum(next(counts) for _ in p.words) + 8 * len(p.messages)

    @functools.cached_property
    def _takes_strings(self) -> bool:
        """Whether the template prints a content that is a string; some want a list of parts always."""
        mark = "\ue0f0mark\ue0f1"
        try:
            return mark in self.processor.apply_chat_template(
                [{"role": "user", "content": mark}], tokenize=False, **self.template_kwargs
            )
        except (TypeError, ValueError, KeyError, AttributeError, jinja2.TemplateError):
            return not self.multimodal

    def _clip(self, part: Media) -> tuple[Tensor, Any]:
        """Frames [F, 3, H, W] uint8 of a video, the same that training takes, and what the processor must know of them."""
        from transformers.video_utils import VideoMetadata

        multiple = int(
            getattr(getattr(self.processor, "video_processor", None), "temporal_patch_size", None) or 1
        )
        header = decoders.video_header(part.source, self.video.fps)
        chosen = decoders.clip(header, self.video, multiple)
        frames = torch.from_numpy(decoders.video(part.source, header, chosen.indices)).permute(0, 3, 1, 2)
        missing = multiple - frames.shape[0]
        if missing > 0:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        indices = [*chosen.indices, *[chosen.indices[-1]] * max(missing, 0)]
        metadata = VideoMetadata(
            header.frames, header.fps, header.width, header.height, header.duration, "av", indices
        )
        return frames, metadata

    def _media_tokens(self, sizes: list[tuple[int, int]], frames: list[tuple[int, int, int]]) -> int:
        """Tokens of the media, to sort by length: exact where the processor can say, else a guess of 256 each."""
        try:
            count = self.processor._get_num_multimodal_tokens(
                image_sizes=sizes or None, video_sizes=frames or None
            )
        except (AttributeError, TypeError, NotImplementedError):
            return 256 * (len(sizes) + len(frames))
        except ValueError as error:  # a shape that the processor refuses
            raise PolymodalError(
                f"A picture or video of this question cannot be used: {error}.", "Cut it to another shape."
            ) from None
        return sum(count.num_image_tokens or ()) + sum(count.num_video_tokens or ())

    def _encode(self, batch: Sequence[_Prepared]) -> dict[str, Tensor]:
        """Left-padded tensors of a batch. User text is taken literally: `<|im_end|>` in it ends nothing."""
        conversations = [p.messages for p in batch]
        common = {
            "tokenize": True,
            "return_dict": True,
            "return_tensors": "pt",
            "add_generation_prompt": True,
            "sanitize_control_tokens": True,
            **self.template_kwargs,
        }
        if not self.multimodal:
            out = self.processor.apply_chat_template(
                conversations, padding=True, tokenizer_kwargs={"padding_side": "left"}, **common
            )
        else:
            options: dict[str, Any] = {"padding": True, "padding_side": "left"}
            if any(p.videos for p in batch):
                options["videos_kwargs"] = {
                    "video_metadata": [p.videos for p in batch],
                    "do_sample_frames": False,
                }
                if hasattr(self.processor.video_processor, "cap_pixels_per_frame"):  # as training has it
                    options["videos_kwargs"]["cap_pixels_per_frame"] = False
            out = self.processor.apply_chat_template(conversations, processor_kwargs=options, **common)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in out.items()}

    # ---------------------------------------------------------------- generation

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Evaluation mode; the checkpoint's generation defaults, and a forward that training bound, put aside."""
        model, own, training = self.model, getattr(self.model, "generation_config", None), self.model.training
        bound = model.__dict__.pop("forward", None)
        model.eval()
        model.generation_config = GenerationConfig(pad_token_id=self.pad, eos_token_id=self.ends or None)
        try:
            with torch.no_grad():
                yield
        finally:
            model.generation_config = own
            model.train(training)
            if bound is not None:
                model.forward = bound

    def _generate(self, batch: Sequence[_Prepared], sampling: Sampling, streamer: Any = None) -> list[Answer]:
        inputs = self._encode(batch)
        width = inputs["input_ids"].shape[1]
        lengths = inputs["attention_mask"].sum(1).tolist()
        processors = sampling.processors([p.key for p in batch])
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, do_sample=False, repetition_penalty=sampling.repetition_penalty,
            pad_token_id=self.pad, eos_token_id=self.ends or None, use_cache=True,
        )  # fmt: skip
        out = self.model.generate(
            **inputs, generation_config=config, logits_processor=processors, streamer=streamer
        )
        return [
            self._answer(ids, length) for ids, length in zip(out[:, width:].tolist(), lengths, strict=True)
        ]

    def _answer(self, ids: list[int], prompt_tokens: int) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        made = ids if end is None else ids[:end]
        text = self.tokenizer.decode(
            made, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()
        return Answer(text, len(made) + (end is not None), int(prompt_tokens), end is not None)

    def _rank(self, batch: Sequence[_Prepared], options: Sequence[Sequence[str]], rows: int) -> list[Answer]:
        """The likeliest option of each question; see `choices`."""
        tokens = [
            [self.tokenizer(o, add_special_tokens=False)["input_ids"] for o in given] for given in options
        ]
        scores: list[list[float]] = [[] for _ in batch]
        quick = [
            i
            for i, given in enumerate(tokens)
            if all(len(ids) == 1 for ids in given) and len({i[0] for i in given}) == len(given)
        ]
        if quick:
            inputs = self._encode([batch[i] for i in quick])
            last = (
                self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float().log_softmax(-1)
            )
            for row, i in enumerate(quick):
                scores[i] = last[row, [ids[0] for ids in tokens[i]]].tolist()
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        slow = [(i, ids + end) for i in range(len(batch)) if i not in quick for ids in tokens[i]]
        for start in range(0, len(slow), rows):
            part = slow[start : start + rows]
            for (i, _), value in zip(
                part, self._continued([batch[i] for i, _ in part], [ids for _, ids in part]), strict=True
            ):
                scores[i].append(value)
        answers = []
        for p, given, values in zip(batch, options, scores, strict=True):
            best = max(range(len(values)), key=values.__getitem__)
            answers.append(Answer(given[best], 0, p.length, True, tuple(values)))
        return answers

    def _continued(self, batch: Sequence[_Prepared], endings: Sequence[list[int]]) -> list[float]:
        """Log-probability of each ending after its prompt: prompts padded left, endings right."""
        inputs = self._encode(batch)
        shape, longest = inputs["input_ids"].shape, max(map(len, endings))
        right = torch.tensor([e + [self.pad] * (longest - len(e)) for e in endings], device=self.device)
        mask = torch.tensor([[1] * len(e) + [0] * (longest - len(e)) for e in endings], device=self.device)
        more = {"input_ids": right, "attention_mask": mask}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == shape:
                inputs[name] = torch.cat([value, more.get(name, torch.zeros_like(right)).to(value.dtype)], 1)
        logits = self.model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits[
            :, -longest - 1 : -1
        ]
        each = logits.float().log_softmax(-1).gather(-1, right[..., None])[..., 0]
        return (each * mask).sum(-1).tolist()

    def _batched(
        self, batch: list[_Prepared], compute: Callable[[list[_Prepared]], list[Answer]]
    ) -> list[Answer]:
        """One batch; halved when the device's memory does not suffice. Answers do not depend on the cut."""
        try:
            with self._quiet():
                return compute(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise PolymodalError(
                    f"The device's memory does not suffice for one question of {batch[0].length} tokens.",
                    "Lower the pictures' size or max_new_tokens, or use a larger device.",
                ) from None
        half = len(batch) // 2
        return self._batched(batch[:half], compute) + self._batched(batch[half:], compute)

    def _many(
        self, conversations: Iterable[tuple[str, Asked]], compute: Callable[[list[_Prepared]], list[Answer]],
        batch_size: int, batch_tokens: int, extra: int,
    ) -> Iterator[tuple[int, Answer | PolymodalError]]:  # fmt: skip
        """Prepare a window ahead in threads, sort it by length, compute it in batches; `extra`: tokens added to each."""

        def ready(item: tuple[int, tuple[str, Any]]) -> _Prepared | tuple[int, PolymodalError]:
            index, (key, conversation) = item
            try:
                return self._prepare(index, key, conversation() if callable(conversation) else conversation)
            except PolymodalError as error:
                return index, error

        items = enumerate(conversations)
        window = 8 * batch_size
        _ = self._takes_strings  # asked once, before there are threads
        with ThreadPoolExecutor(2) as pool:
            ahead = list(pool.map(ready, islice(items, window)))
            while ahead:
                now, later = ahead, [pool.submit(ready, item) for item in islice(items, window)]
                yield from (p for p in now if isinstance(p, tuple))
                todo = [p for p in now if isinstance(p, _Prepared)]
                self._measure(todo)
                todo.sort(key=lambda p: (p.length, p.index))
                while todo:
                    batch = [todo.pop()]  # longest first: memory is tried early
                    width = batch[0].length + extra
                    while todo and len(batch) < batch_size and width * (len(batch) + 1) <= batch_tokens:
                        batch.append(todo.pop())
                    yield from zip((p.index for p in batch), self._batched(batch, compute), strict=True)
                ahead = [f.result() for f in later]

    def answers(
        self,
        conversations: Iterable[tuple[str, Asked]],
        sampling: Sampling = Sampling(),
        *,
        batch_size: int = 16,
        batch_tokens: int = 32768,
    ) -> Iterator[tuple[int, Answer | PolymodalError]]:
        """Answer many (key, conversation) pairs; yields (position, answer) a batch at a time, by length, not in order.

        A conversation may be a function that makes it, called in a thread while the batch before is computed. What
        is wrong with one conversation (a broken picture) is its result; it does not stop the others. A batch holds
        at most batch_size conversations and batch_tokens tokens, padding and answers included.
        """
        return self._many(
            conversations,
            lambda batch: self._generate(batch, sampling),
            batch_size,
            batch_tokens,
            sampling.max_new_tokens,
        )

    def choices(
        self,
        questions: Sequence[tuple[str, Asked, Sequence[str]]],
        *,
        batch_size: int = 16,
        batch_tokens: int = 32768,
    ) -> Iterator[tuple[int, Answer | PolymodalError]]:
        """The option that the model finds likeliest as its answer, for many (key, conversation, options); no sampling.

        The text of an Answer is the option, `scores` the log-probabilities: of the option's tokens and the end token
        after them; of the token alone where all options of a question are one token (then one pass does it).
        """
        for key, _, options in questions:
            if not options or not all(options):
                raise PolymodalError(
                    f"Question {key} has no options to choose among, or an empty one.",
                    "Likelihood compares given options.",
                )
        given = [options for _, _, options in questions]
        return self._many(
            [(key, conversation) for key, conversation, _ in questions],
            lambda batch: self._rank(batch, [given[p.index] for p in batch], batch_size), batch_size, batch_tokens, 16,
        )  # fmt: skip

    def answer(
        self,
        conversation: Conversation,
        sampling: Sampling = Sampling(),
        *,
        key: str = "0",
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """One answer; `on_text` gets its pieces while they are made. Raises PolymodalError on broken media."""
        prepared = self._prepare(0, key, conversation)
        with self._quiet():
            return self._generate(
                [prepared], sampling, _Streamer(self.tokenizer, on_text) if on_text else None
            )[0]


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
