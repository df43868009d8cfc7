"""Ask a model behind an OpenAI-compatible endpoint the rows of a benchmark."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from spavl_lib.config import EvaluationConfig, GenerationConfig
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.benchmark_runs.asking import asked_sha, prompt_row
from spavl_lib.evaluation.benchmark_runs.journal import Journal
from spavl_lib.evaluation.benchmark_runs.subject import Subject
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.judges import rubric
from spavl_lib.evaluation.judges.endpoint import WORKERS, Client, Unanswered, agree, with_image
from spavl_lib.runs.signals import RESUME

NAMES = ("the endpoint's address", "the model's name at the endpoint")  # in error messages


class EndpointAsker:
    """Asks the model of an endpoint at temperature 0, several rows at a time.

    Args:
        subject: The model's name at the endpoint, and the endpoint's address.
        config: Length of the answers.
        settings: The budget, and the agreement to what another host receives.

    Raises:
        InputError: The address cannot be used, sampling is asked for, or the host is another
            machine and its user has not agreed.
    """

    def __init__(self, subject: Subject, config: GenerationConfig, settings: EvaluationConfig):
        if config.do_sample:
            raise InputError(
                "generation.do_sample: an endpoint is asked at temperature 0; leave the setting out"
            )
        self.subject = subject
        self.client = Client(
            subject.url, subject.served, budget=settings.judge_budget,
            reply_tokens=config.max_new_tokens, names=NAMES,
        )  # fmt: skip
        agree(self.client.host, "prompts and images that are asked", settings.judge_yes)

    def ask(self, rows: Sequence[BenchmarkRow], journal: Journal, should_stop: object) -> None:
        """Ask the rows that have no answer yet.

        A request that the endpoint rejects gets an answer with the error. One that failed for a
        reason that may pass is asked again by the next call.

        Args:
            rows: All rows.
            journal: Receives the answers.
            should_stop: Truthy once the process is asked to stop; polled between groups of rows.

        Raises:
            InputError: The endpoint fails, or left rows without a reply.
            Preempted: The process was asked to stop. The answers are kept.
        """
        todo = [row for row in rows if row.id not in journal.records]
        left: dict[str, str] = {}
        done = len(rows) - len(todo)
        with (
            tqdm(total=len(rows), initial=done, desc=self.subject.name, unit="row") as bar,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            for start in range(0, len(todo), 2 * WORKERS):
                if should_stop:
                    raise Preempted(
                        f"stopped with {len(journal.records)} of {len(rows)} answers written; "
                        f"{RESUME}"
                    )
                part = todo[start : start + 2 * WORKERS]
                answers = dict(zip([r.id for r in part], pool.map(self._answer, part), strict=True))
                for row_id, answer in answers.items():
                    problem = answer.get("error", "")
                    if rubric.may_come_later(problem):
                        left[row_id] = problem
                journal.append(
                    {"id": row.id, "asked": asked_sha(row), "prompt": row.prompt} | answers[row.id]
                    for row in part
                    if row.id not in left
                )
                bar.update(len(part))
        if left:
            reason = next(iter(left.values()))
            raise InputError(
                f"{self.subject.name}: {len(left)} of {len(rows)} rows have no reply ({reason}); "
                "run the same command again to ask them"
            )

    def _answer(self, row: BenchmarkRow) -> dict[str, Any]:
        message = {"role": "user", "content": row.prompt}
        try:
            [asked] = with_image([message], prompt_row(row))
            return {"response": self.client([asked])}
        except Unanswered as error:
            return {"response": "", "error": str(error)}

    def close(self) -> None:
        """Nothing is held that a judge could use."""
