"""One model, ready to answer: batches of conversations in, texts out. Generation is transformers' own.

Nothing is applied that was not asked for (a checkpoint's own sampling defaults are ignored, greedy is the
default), and the random draws of an answer depend on (seed, key of the question) alone: not on its batch, its
order, or the number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Message
from polymodal.data import audio
from polymodal.data import media as decoders
from polymodal.data.boxes import BoxWriter
from polymodal.data.sandbox import bound_templates, template_errors
from polymodal.generate.sampling import Sampling

__all__ = ["Answer", "Conversation", "Engine", "Sampling"]

BATCH_TOKENS = 32768
Conversation = Sequence[Message]
Question = Callable[[], Conversation] | Conversation
"""A conversation, or what makes one."""


@dataclass(frozen=True)
class Answer:
    """tokens: made, the end token included. finished: not cut by max_new_tokens.

    scores: log-probability of each option, where options were compared. boxes: those of the text, and points,
    in pixels of the picture; size: its (height, width), None without one picture that they could be of.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finished: bool
    scores: tuple[float, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    size: tuple[int, int] | None = None


Result = tuple[int, Answer | PolymodalError]
"""Position of a conversation, and its answer or what is wrong with it."""


def _frames_as_pictures(inputs: Mapping[str, Any], placeholder: int | None) -> Mapping[str, Any]:
    """Inputs with pictures and videos whose placeholders are the pictures' too: the library's forward counts
    each kind against all of them, so that frames are given as pictures, all in the order of the text.

    placeholder: that of videos, which the inputs of other models hold.
    """
    kinds = ("pixel_values", "pixel_values_videos", "mm_token_type_ids")
    if placeholder is None or any(kind not in inputs for kind in kinds) or placeholder in inputs["input_ids"]:
        return inputs
    grids = (
        inputs["image_grid_thw"],
        inputs["video_grid_thw"].repeat_interleave(inputs["video_grid_thw"][:, 0], 0),
    )
    grids[1][:, 0] = 1
    rows = (inputs[kind].split(grid.prod(1).tolist()) for kind, grid in zip(kinds, grids, strict=False))
    media = [iter(zip(part, grid, strict=True)) for part, grid in zip(rows, grids, strict=True)]
    types = inputs["mm_token_type_ids"].flatten().unique_consecutive()
    pixels, sizes = zip(*(next(media[kind - 1]) for kind in types[types > 0].tolist()), strict=True)
    kept = {key: value for key, value in inputs.items() if "video" not in key}
    made = {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(sizes)}
    return {**kept, **made, "mm_token_type_ids": inputs["mm_token_type_ids"].clamp(max=1)}


@dataclass
class _Prepared:
    """A conversation with decoded media, in the form the processor takes.

    length: tokens of its media at first, of all of it once `Engine._measure` has counted its words.
    """

    index: int
    key: str
    messages: list[dict[str, Any]]
    videos: list[Any]  # VideoMetadata of each video
    steps: list[float]  # seconds between its temporal patches
    words: list[str]
    length: int
    sizes: list[tuple[int, int]]  # (height, width) of each picture


class Engine:
    """A model with its processor on one device.

    model: a transformers model that generates. processor: its AutoProcessor, or a tokenizer for text-only
    models. video, template_kwargs, special_tokens: how videos are sampled and prompts written, as in the
    recipe; where it is `tokens`, those in a text are the tokens, else ordinary text. name,
    identity: for reports, and to know later whether stored answers are this model's. boxes: how it writes
    them.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        video: recipes.Video | None = None,
        template_kwargs: dict[str, Any] | None = None,
        special_tokens: str = "auto",
        name: str = "model",
        identity: str | None = None,
        boxes: BoxWriter | None = None,
    ):
        if not hasattr(model, "generate"):
            raise PolymodalError(
                f"{type(model).__name__} cannot generate text.",
                "Give a checkpoint of a language or vision-language model.",
            )
        bound_templates()
        self.model, self.processor, self.name = model, processor, name
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.multimodal = self.tokenizer is not processor
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        self.tokenizer.chat_control_tokens = [token for token in added if not token.isspace()]
        self.literal = special_tokens != "tokens"
        own = self.multimodal and "__call__" in vars(type(processor))  # then marked text is not known
        tokens = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        self._media_words = [token for token in tokens if token and (own or not self.literal)]
        self.device = next(model.parameters()).device
        self.video = video or recipes.Video()
        self.hears = getattr(processor, "feature_extractor", None) if self.multimodal else None
        self.template_kwargs = template_kwargs or {}
        self._identity = identity
        self.boxes = boxes or BoxWriter(None, lambda height, width: (height, width))
        if self.boxes.form is not None and self.boxes.form.tokens:  # they end no turn and stand for no medium
            kept, control = self.boxes.form.tokens, self.tokenizer._get_control_tokens
            self.tokenizer._get_control_tokens = lambda text: tuple(t for t in control(text) if t not in kept)
        if getattr(model.config, "is_encoder_decoder", False):
            raise PolymodalError(
                f"{name} transcribes speech, it does not answer questions.",
                "Use `polymodal transcribe`, or `polymodal evaluate CHECKPOINT speech`.",
            )
        if not any(getattr(part, "chat_template", None) for part in (processor, self.tokenizer)):
            raise PolymodalError(
                f"{name} has no chat template.",
                "Put a chat_template.jinja beside its tokenizer, or set data.chat_template in the recipe it "
                "was trained with.",
            )
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id]
        self.ends = sorted({end for end in ends if end is not None})
        pad = self.tokenizer.pad_token_id
        self.pad = pad if pad is not None else (self.ends[0] if self.ends else 0)

    @property
    def identity(self) -> str:
        """Changes when the weights do: given by who opened a checkpoint, else a digest of all parameters."""
        if self._identity is not None:
            return self._identity
        digest = hashlib.blake2b(digest_size=16)
        for name, p in sorted(self.model.named_parameters()):
            value = p.detach().double()
            largest = value.abs().max().item() if p.numel() else 0
            digest.update(f"{name} {tuple(p.shape)} {value.sum().item()!r} {largest!r}\n".encode())
        return digest.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the weights decides an answer. JSON-able."""
        size = getattr(getattr(self.processor, "image_processor", None), "size", None)
        return {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "image_size": dict(size) if size is not None else None,
            "video": self.video.model_dump(),
            "template": {"kwargs": self.template_kwargs, **({} if self.literal else {"tokens": True})},
        }

    # --- conversations -> tensors -----------------------------------------------------------------

    def _prepare(self, index: int, key: str, conversation: Conversation) -> _Prepared:
        """Decode media, lay the messages out for the template, and measure. Raises PolymodalError."""
        messages, videos, steps, sizes, frames, words = [], [], [], [], [], []
        sounds: list[int] = []
        for message in self.boxes.messages(tuple(conversation)):
            parts: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, str):
                    parts.append({"type": "text", "text": part})
                    words.append(part)
                elif not self.multimodal:
                    raise PolymodalError(
                        f"{self.name} reads text only, the question has {part.kind}s.",
                        "Leave the media out, or give a vision-language model.",
                    )
                elif part.kind == "image":
                    picture = decoders.image(part.source)  # type: ignore[arg-type]
                    sizes.append((picture.height, picture.width))
                    parts.append({"type": "image", "image": picture})
                elif part.kind == "video":
                    clip, metadata, step = self._clip(part)
                    videos.append(metadata)
                    steps.append(step)
                    frames.append((clip.shape[0], clip.shape[2], clip.shape[3]))
                    parts.append({"type": "video", "video": clip})
                    if self.video.sound and self.hears is not None:
                        parts[-1]["sound"] = self._sound(part)
                        sounds.append(len(parts[-1]["sound"]))
                elif part.kind == "audio" and self.hears is not None:
                    parts.append({"type": "audio", "audio": self._sound(part)})
                    sounds.append(len(parts[-1]["audio"]))
                else:
                    raise PolymodalError(
                        f"{self.name} does not take {part.kind}.",
                        "Leave it out, or give a model that reads it (`polymodal models`).",
                    )
            content: Any = parts
            if self._takes_strings and all(p["type"] == "text" for p in parts):  # the form training gives it
                content = "".join(p["text"] for p in parts)
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if message.tool_calls:
                entry["tool_calls"] = list(message.tool_calls)
            if message.reasoning:
                entry["reasoning_content"] = message.reasoning
            messages.append(entry)
        for token in self._media_words:
            if any(token in text for text in words):
                raise PolymodalError(
                    f"The text holds {token}, which stands for a medium to this model's processor.",
                    "Write it otherwise; media are given beside the text.",
                )
        with template_errors():
            self._render(messages)
        length = self._media_tokens(sizes, frames, sounds)
        return _Prepared(index, key, messages, videos, steps, words, length, sizes)

    def _measure(self, prepared: Sequence[_Prepared]) -> None:
        """Add the words' tokens to the lengths. Not in threads: two must not use a fast tokenizer at once."""
        texts = [text for p in prepared for text in p.words]
        counts = iter([len(ids) for ids in self.tokenizer(texts)["input_ids"]] if texts else ())
        for p in prepared:
            p.length += sum(next(counts) for _ in p.words) + 8 * len(p.messages)

    @functools.cached_property
    def _takes_strings(self) -> bool:
        """Whether the template prints a content that is a string; some want a list of parts always."""
        mark = "\ue0f0mark\ue0f1"
        try:
            with template_errors():
                return mark in self._render([{"role": "user", "content": mark}])
        except PolymodalError:
            return not self.multimodal

    def _render(self, messages: list[dict[str, Any]]) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, **self.template_kwargs}
        return self.processor.apply_chat_template(messages, **options)

    def _sound(self, part: Media) -> np.ndarray:
        """Samples of a recording, or of a video's sound, float32 [n]. Raises PolymodalError."""
        rate, source = self.hears.sampling_rate, part.source
        if part.kind == "video":
            count = audio.sound_samples(source, decoders.video_header(source, self.video.fps), rate)
            heard = audio.sound(source, rate, count).mean(axis=0)  # type: ignore[arg-type]
        else:
            heard = audio.decode_audio(source, audio.audio_header(source), rate)  # type: ignore[arg-type]
        if len(heard) > self.hears.n_samples:
            raise PolymodalError(
                f"{decoders.label(source)} has {len(heard) / rate:.1f} s of sound, {self.name} takes "
                f"{self.hears.n_samples / rate:g} s at once.",
                "Cut it.",
            )
        return heard

    def _clip(self, part: Media) -> tuple[Tensor, Any, float]:
        """Frames [F, 3, H, W] uint8 of a video, as training takes them, the processor's facts of them, and
        the seconds between temporal patches."""
        from transformers.video_utils import VideoMetadata

        processor = getattr(self.processor, "video_processor", None)
        multiple = int(getattr(processor, "temporal_patch_size", None) or 1)
        header = decoders.video_header(part.source, self.video.fps)
        chosen = decoders.clip(header, self.video, multiple)
        indices = list(chosen.indices)
        frames = torch.from_numpy(decoders.video(part.source, header, indices)).permute(0, 3, 1, 2)
        missing = multiple - len(frames)
        if missing > 0:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
            indices += [indices[-1]] * missing
        facts = (header.frames, header.fps, header.width, header.height, header.duration)
        return frames, VideoMetadata(*facts, "av", indices), multiple / chosen.fps

    def _media_tokens(
        self, sizes: list[tuple[int, int]], frames: list[tuple[int, int, int]], sounds: list[int]
    ) -> int:
        """Tokens of the media, to sort by length: exact where the processor counts them, else 256 each."""
        try:
            asked: dict[str, Any] = {"image_sizes": sizes, "video_sizes": frames, "audio_lengths": sounds}
            count = self.processor._get_num_multimodal_tokens(**{k: v for k, v in asked.items() if v})
        except (AttributeError, TypeError, NotImplementedError):
            return 256 * (len(sizes) + len(frames) + len(sounds))
        except ValueError as error:  # a shape that the processor refuses
            raise PolymodalError(
                f"A picture or video of this question cannot be used: {error}.", "Cut it to another shape."
            ) from None
        tokens = (getattr(count, f"num_{kind}_tokens", None) or () for kind in ("image", "video", "audio"))
        return sum(map(sum, tokens))

    def _encode(self, batch: Sequence[_Prepared]) -> dict[str, Tensor]:
        """Left-padded tensors of a batch. User text is taken literally: `<|im_end|>` in it ends nothing."""
        padding: dict[str, Any] = {"padding": True, "padding_side": "left"}
        if self.multimodal and any(p.videos for p in batch):
            padding["videos_kwargs"] = {
                "video_metadata": [p.videos for p in batch],
                "do_sample_frames": False,
            }
            if hasattr(self.processor.video_processor, "cap_pixels_per_frame"):  # as training has it
                padding["videos_kwargs"]["cap_pixels_per_frame"] = False
        if self.multimodal:
            options: dict[str, Any] = {"processor_kwargs": padding}
        else:
            options = {"padding": True, "tokenizer_kwargs": {"padding_side": "left"}}
        if any("sound" in part for p in batch for part in _parts(p.messages)):
            options["load_audio_from_video"] = True
        with self._timed(batch):
            out = self.processor.apply_chat_template(
                [p.messages for p in batch],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                sanitize_control_tokens=self.literal,
                **self.template_kwargs,
                **options,
            )
        out = _frames_as_pictures(out, getattr(self.model.config, "video_token_id", None))
        made = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in out.items()}
        if "video_second_per_grid" in made:  # a list, and whether there is sound in all videos
            made["video_second_per_grid"] = torch.as_tensor(made["video_second_per_grid"], device=self.device)
            made["use_audio_in_video"] = "load_audio_from_video" in options
        return made

    @contextlib.contextmanager
    def _timed(self, batch: Sequence[_Prepared]) -> Iterator[None]:
        """Inside, a processor of videos with sound gets the sound that was decoded, and the times that frames
        have: by itself it opens files, and takes all videos to have one rate."""
        processor = self.processor
        if not hasattr(processor, "replace_video_with_audio_token"):
            yield
            return
        steps = [step for p in batch for step in p.steps]
        replace, collect = processor.replace_video_token, processor._multimodal_inputs_from_conversations

        def replace_video_token(inputs: dict[str, Any], video_idx: int, **options: Any) -> str:
            inputs["video_second_per_grid"][video_idx] = steps[video_idx]
            return replace(inputs, video_idx=video_idx, **options)

        def with_sounds(conversations: Any, *options: Any) -> tuple:
            pictures, videos, sounds, more = collect(conversations, *options)
            if options[-1]:
                heard = (part for each in conversations for part in _parts(each))
                sounds = [part.get("sound", part.get("audio")) for part in heard]
                sounds = [sound for sound in sounds if sound is not None]
            return pictures, videos, sounds, more

        processor.replace_video_token = replace_video_token
        processor._multimodal_inputs_from_conversations = with_sounds
        try:
            yield
        finally:
            del processor.replace_video_token, processor._multimodal_inputs_from_conversations

    # --- generation -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode, without the checkpoint's generation defaults and a forward that training bound."""
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
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            repetition_penalty=sampling.repetition_penalty,
            pad_token_id=self.pad,
            eos_token_id=self.ends or None,
            use_cache=True,
        )
        processors = sampling.processors([p.key for p in batch])
        out = self.model.generate(
            **inputs, generation_config=config, logits_processor=processors, streamer=streamer
        )
        made = out[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [self._answer(*each) for each in zip(made, map(int, lengths), batch, strict=True)]

    def _answer(self, ids: list[int], prompt_tokens: int, asked: _Prepared) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        made = ids[:end]
        text = self.tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size = asked.sizes[0] if len(set(asked.sizes)) == 1 else None
        boxes = tuple(self.boxes.found(text.strip(), *size)) if size is not None else ()
        tokens = len(made) + (end is not None)
        return Answer(text.strip(), tokens, prompt_tokens, end is not None, boxes=boxes, size=size)

    def _rank(self, batch: Sequence[_Prepared], options: Sequence[Sequence[str]], rows: int) -> list[Answer]:
        """The likeliest option of each question; see `choices`. rows: endings computed together."""

        def ids_of(option: str) -> list[int]:
            return self.tokenizer(option, add_special_tokens=False, split_special_tokens=self.literal)[
                "input_ids"
            ]

        tokens = [[ids_of(option) for option in own] for own in options]
        scores: list[list[float]] = [[] for _ in batch]
        single = [i for i, own in enumerate(tokens) if _single_tokens(own)]
        if single:
            inputs = self._encode([batch[i] for i in single])
            logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits
            last = logits[:, -1].float().log_softmax(-1)
            for row, i in enumerate(single):
                scores[i] = last[row, [ids[0] for ids in tokens[i]]].tolist()
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        endings = [(i, ids + end) for i in range(len(batch)) if i not in single for ids in tokens[i]]
        for start in range(0, len(endings), rows):
            part = endings[start : start + rows]
            values = self._continued([batch[i] for i, _ in part], [ids for _, ids in part])
            for (i, _), value in zip(part, values, strict=True):
                scores[i].append(value)
        best = [max(range(len(values)), key=values.__getitem__) for values in scores]
        return [
            Answer(own[at], 0, p.length, True, tuple(values))
            for p, own, at, values in zip(batch, options, best, scores, strict=True)
        ]

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
        logits = self.model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits
        each = logits[:, -longest - 1 : -1].float().log_softmax(-1).gather(-1, right[..., None])[..., 0]
        return (each * mask).sum(-1).tolist()

    def _batched(
        self, batch: list[_Prepared], compute: Callable[[list[_Prepared]], list[Answer]]
    ) -> list[Answer]:
        """One batch; halved when the device's memory does not suffice. Answers do not depend on the cut."""
        try:
            with self._inference():
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
        self,
        conversations: Iterable[tuple[str, Question]],
        compute: Callable[[list[_Prepared]], list[Answer]],
        batch_size: int,
        extra: int,
    ) -> Iterator[Result]:
        """Prepare a window ahead in threads, sort it by length, compute it in batches.

        extra: tokens added to each conversation.
        """

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
                later = [pool.submit(ready, item) for item in islice(items, window)]
                yield from (p for p in ahead if isinstance(p, tuple))
                todo = [p for p in ahead if isinstance(p, _Prepared)]
                self._measure(todo)
                todo.sort(key=lambda p: (p.length, p.index))
                while todo:
                    batch = [todo.pop()]  # longest first: memory is tried early
                    width = batch[0].length + extra
                    while todo and len(batch) < batch_size and width * (len(batch) + 1) <= BATCH_TOKENS:
                        batch.append(todo.pop())
                    yield from zip((p.index for p in batch), self._batched(batch, compute), strict=True)
                ahead = [f.result() for f in later]

    def answers(
        self,
        conversations: Iterable[tuple[str, Question]],
        sampling: Sampling = Sampling(),
        *,
        batch_size: int = 16,
    ) -> Iterator[Result]:
        """Answer many (key, conversation) pairs; yields (position, answer) a batch at a time, by length.

        A conversation may be a function that makes it, called in a thread while the batch before is computed.
        What is wrong with one conversation (a broken picture) is its result; it does not stop the others. A
        batch holds at most batch_size conversations and BATCH_TOKENS tokens, padding and answers included.
        """
        compute = functools.partial(self._generate, sampling=sampling)
        return self._many(conversations, compute, batch_size, sampling.max_new_tokens)

    def choices(
        self, questions: Sequence[tuple[str, Question, Sequence[str]]], *, batch_size: int = 16
    ) -> Iterator[Result]:
        """The likeliest option as the answer of each (key, conversation, options); no sampling.

        The text of an Answer is the option, `scores` the log-probabilities: of the option's tokens and the
        end token after them; of the token alone where all options of a question are one token (then one pass
        does it).
        """
        for key, _, options in questions:
            if not options or not all(options):
                raise PolymodalError(
                    f"Question {key} has no options to choose among, or an empty one.",
                    "Likelihood compares given options.",
                )

        def compute(batch: list[_Prepared]) -> list[Answer]:
            return self._rank(batch, [questions[p.index][2] for p in batch], batch_size)

        pairs = [(key, conversation) for key, conversation, _ in questions]
        return self._many(pairs, compute, batch_size, 16)

    def answer(
        self,
        conversation: Conversation,
        sampling: Sampling = Sampling(),
        *,
        key: str = "0",
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """One answer; `on_text` gets its pieces as they are made. Raises PolymodalError on broken media."""
        prepared = self._prepare(0, key, conversation)
        streamer = _Streamer(self.tokenizer, on_text) if on_text else None
        with self._inference():
            return self._generate([prepared], sampling, streamer)[0]


def _parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of messages whose content is a list."""
    return [part for each in messages if isinstance(each["content"], list) for part in each["content"]]


def _single_tokens(options: Sequence[list[int]]) -> bool:
    """Whether each option is one token, another for each."""
    return all(len(ids) == 1 for ids in options) and len({ids[0] for ids in options}) == len(options)


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
