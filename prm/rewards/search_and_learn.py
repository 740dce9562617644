"""Best-of-N, beam search and DVTS of Hugging Face's search-and-learn.

    prm = SearchAndLearnPRM(Scorer.from_pretrained("runs/net/model"))
    best_of_n(examples, config, llm, prm)

Its searches call ``prm.score(questions, outputs)`` and nothing else of a ``PRM``
(``sal.models.reward_models``), and aggregate the step scores themselves. In a beam search the last
step score is that of the newest step, since a beam is scored as far as it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from prm.rewards.scorer import Scorer


class SearchAndLearnPRM:
    """A ``PRM`` of search-and-learn.

    Args:
        scorer: The reward model.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def score(
        self, questions: Sequence[str], outputs: Sequence[Sequence[str]]
    ) -> list[list[list[float]]]:
        """Return the step scores of every output of every question, [questions][outputs][steps].

        Raises:
            DataError: An output cannot be judged, for example because it is blank.
            ValueError: The lists differ in length.
        """
        if len(questions) != len(outputs):
            raise ValueError(
                f"expected the outputs of every question, found {len(questions)} questions and "
                f"{len(outputs)} lists of outputs"
            )
        pairs = [
            (question, output)
            for question, several in zip(questions, outputs, strict=True)
            for output in several
        ]
        scores = iter(self.scorer.score([pair[0] for pair in pairs], [pair[1] for pair in pairs]))
        return [[next(scores) for _ in several] for several in outputs]
