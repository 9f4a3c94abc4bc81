"""Any causal language model under lm-evaluation-harness.

The harness asks for log-likelihoods of continuations. `HarnessModel` answers from two functions,
`hidden` and `head`, so that logits are computed only where a continuation is scored and never for
the context: at Pythia-70M's shape the output embedding is almost half of all work.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from l2e.analysis.activations import length_batches, pad
from l2e.progress import Progress

# Rows of fp32 logits held at once while scoring; 512 rows of 50k tokens are 100 MB.
ROWS_PER_SOFTMAX = 512


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Scored:
    """A model as the harness needs it.

    `hidden` maps tokens [batch, positions] to states [batch, positions, hidden]; `head` maps
    states [rows, hidden] to logits [rows, vocabulary]. Inside `remembering()` a call of `hidden`
    goes on after the tokens of the calls before it, from the second on by one token each.
    `maximum_length` is in tokens, `end_of_document` is the token id that separates documents.
    """

    hidden: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    remembering: Callable[[], AbstractContextManager[None]]
    tokenizer: Tokenizer
    maximum_length: int
    end_of_document: int
    device: torch.device


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats, summed over the tokens) and whether greedy decoding says the same."""

    log_likelihood: float
    greedy: bool


class HarnessModel(TemplateLM):
    """lm-evaluation-harness's view of a `Scored` model.

    `batch_tokens` bounds a forward pass (sequences x longest). With `group`, its ranks share the
    forward passes and every rank gets every answer; the harness sees one process, so prompts and
    scores don't depend on the number of ranks. Without it, a process answers everything.
    """

    def __init__(
        self, model: Scored, batch_tokens: int = 4096, group: dist.ProcessGroup | None = None
    ):
        super().__init__()
        self.model = model
        self.batch_tokens = batch_tokens
        self.group = group
        self._device = model.device
        self._requests: list[Any] = []
        # Items of each task whose prompt lost its beginning, and whose answer was given less room.
        self.cut: dict[str, set[int]] = defaultdict(set)
        self.shortened: dict[str, set[int]] = defaultdict(set)
        # Among those that share the work; the harness has a `rank` of its own, always 0.
        self.group_rank = dist.get_rank(group) if group else 0
        self.group_size = dist.get_world_size(group) if group else 1

    @property
    def eot_token_id(self) -> int:
        return self.model.end_of_document

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.model.tokenizer.encode(string)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._requests = requests  # which the harness does not hand on with their tokens
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for request, (context, continuation) in zip(self._requests, pairs, strict=True):
            if not continuation:
                raise ValueError(
                    f"task {request.task_name}, item {request.doc_id}: an answer without a single "
                    "token, which would be the likeliest of all; mend the item"
                )
            if len(context) + len(continuation) > self.model.maximum_length + 1:
                self.cut[request.task_name].add(request.doc_id)
        scores = self.score(pairs, quiet=disable_tqdm)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once with the longest context."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.model.maximum_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.score(pairs, quiet=disable_tqdm), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    @torch.no_grad()
    def score(
        self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool = False
    ) -> list[Score]:
        """Score each (context tokens, continuation tokens), in the given order.

        Pairs whose tokens differ only in the last one (single-token answers to one question) share
        a forward pass. Contexts too long for the model lose tokens on the left.
        """
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.model.maximum_length:
                raise ValueError(
                    f"an answer of {len(continuation)} tokens does not fit the model's "
                    f"{self.model.maximum_length} positions; leave its task out"
                )
            tokens = (context + continuation)[-(self.model.maximum_length + 1) :]
            sharing.setdefault(tuple(tokens[:-1]), []).append(index)
        scores: dict[int, Score] = {}
        sequences = sorted(sharing)  # whatever the order of the pairs, the batches are the same
        lengths = np.array([len(inputs) for inputs in sequences])
        batches = length_batches(lengths, self.batch_tokens)
        for rows in self._progress(batches[self.group_rank :: self.group_size], "scoring", quiet):
            batch = [sequences[row] for row in rows]
            users = [[(index, pairs[index][1]) for index in sharing[inputs]] for inputs in batch]
            scores.update(self._score_batch(batch, users))
        for other in self._exchange(scores):
            scores.update(other)
        return [scores[index] for index in range(len(pairs))]

    def _score_batch(
        self, batch: list[tuple[int, ...]], users: list[list[tuple[int, list[int]]]]
    ) -> dict[int, Score]:
        """Scores of one batch; `users` holds each sequence's (request, continuation) pairs."""
        ids, _ = pad(batch, self.model.device)  # on the right, where a causal model cannot see it
        states = self.model.hidden(ids)
        selected: list[Tensor] = []
        rows: list[int] = []
        targets: list[int] = []
        requests: list[int] = []
        end = 0
        for state, inputs, wanted in zip(states, batch, users, strict=True):
            longest = max(len(continuation) for _, continuation in wanted)
            selected.append(state[len(inputs) - longest : len(inputs)])
            end += longest
            for request, continuation in wanted:
                rows += range(end - len(continuation), end)
                targets += continuation
                requests += [request] * len(continuation)
        scores: dict[int, Score] = {}
        values = self._score_rows(torch.cat(selected), torch.tensor(rows), torch.tensor(targets))
        for request, value, best in zip(requests, *values, strict=True):
            sofar = scores.get(request, Score(0.0, True))
            scores[request] = Score(sofar.log_likelihood + value, sofar.greedy and best)
        return scores

    def _score_rows(
        self, states: Tensor, rows: Tensor, targets: Tensor
    ) -> tuple[list[float], list[bool]]:
        """Log-likelihood of each target at its row of `states`, and whether it is the largest."""
        values = torch.empty(len(rows), dtype=torch.float32)
        best = torch.empty(len(rows), dtype=torch.bool)
        for start in range(0, len(states), ROWS_PER_SOFTMAX):
            logits = self.model.head(states[start : start + ROWS_PER_SOFTMAX]).float()
            here = (rows >= start) & (rows < start + ROWS_PER_SOFTMAX)
            local, wanted = (rows[here] - start).to(logits.device), targets[here].to(logits.device)
            log_normaliser = logits.logsumexp(dim=-1)
            values[here] = (logits[local, wanted] - log_normaliser[local]).cpu()
            best[here] = (logits.argmax(dim=-1)[local] == wanted).cpu()
        return values.tolist(), best.tolist()

    @torch.no_grad()
    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string; a token costs one position's forward pass.

        A prompt that leaves less room than the task asks for gets a shorter answer.

        Raises:
            ValueError: a prompt leaves no room at all; nothing has been generated then.
        """
        prompts, limits = [], []
        for request in requests:
            context, settings = request.args
            prompt = self.tok_encode(context) or [self.eot_token_id]
            wanted = settings.get("max_gen_toks", 256)
            limit = min(wanted, self.model.maximum_length - len(prompt))
            if limit < 1:
                raise ValueError(
                    f"task {request.task_name}, item {request.doc_id}: its prompt of {len(prompt)} "
                    f"tokens leaves no room for an answer in the model's "
                    f"{self.model.maximum_length} positions; leave the task out, or ask for fewer "
                    "--shots"
                )
            if limit < wanted:
                self.shortened[request.task_name].add(request.doc_id)
            prompts.append(prompt)
            limits.append(limit)
        answers = [""] * len(requests)
        mine = range(self.group_rank, len(requests), self.group_size)
        for index in self._progress(mine, "generating", disable_tqdm):
            stops = handle_stop_sequences(requests[index].args[1].get("until"), eos=None)
            answers[index] = self._generate(prompts[index], limits[index], stops)
        everyone = self._exchange(answers)
        return [everyone[index % self.group_size][index] for index in range(len(requests))]

    def _generate(self, prompt: list[int], limit: int, stops: list[str]) -> str:
        generated: list[int] = []
        unread = prompt
        with self.model.remembering():
            while len(generated) < limit:
                tokens = torch.tensor([unread], device=self.model.device)
                token = int(self.model.head(self.model.hidden(tokens)[0, -1:]).argmax())
                if token == self.eot_token_id:
                    break
                generated.append(token)
                unread = [token]
                if any(stop in self.model.tokenizer.decode(generated) for stop in stops):
                    break
        text = self.model.tokenizer.decode(generated)
        return postprocess_generated_text(text, stop=stops, think_end_token=None)

    def _exchange(self, mine: Any) -> list[Any]:
        """What every rank of the group has, by rank."""
        if self.group is None:
            return [mine]
        everyone = [None] * self.group_size
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def _progress(self, work: Sequence, what: str, quiet: bool) -> Iterable:
        shown = not quiet and self.group_rank == 0
        return Progress(work, desc=what, unit="batches", progress=shown, file=sys.__stderr__)
