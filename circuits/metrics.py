"""What a prompt set's behaviour is measured by: one number a prompt, from the logits at its last position.

    logit_difference        mean logit of the answers - mean logit of the wrong answers
    probability_difference  summed probability of the answers - that of the wrong answers (greater-than;
                            Hanna et al. 2023, arXiv 2305.00586)
    answer_log_probability  log of the summed probability of the answers

Larger is more of the behaviour. Answers belong to the clean prompt.
"""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from circuits.prompts import NO_TOKEN, PromptSet

Metric = Callable[[Float[Tensor, "n vocab"], PromptSet], Float[Tensor, "n"]]


def logit_difference(logits: Float[Tensor, "n vocab"], prompts: PromptSet) -> Float[Tensor, "n"]:
    """Mean answer logit minus mean wrong-answer logit."""
    return _mean(logits, prompts.answers) - _mean(logits, prompts.wrong)


def probability_difference(logits: Float[Tensor, "n vocab"], prompts: PromptSet) -> Float[Tensor, "n"]:
    """Summed answer probability minus summed wrong-answer probability."""
    probabilities = logits.softmax(dim=-1)
    return _sum(probabilities, prompts.answers) - _sum(probabilities, prompts.wrong)


def answer_log_probability(logits: Float[Tensor, "n vocab"], prompts: PromptSet) -> Float[Tensor, "n"]:
    """Log of the probability that the next token is an answer."""
    return _sum(logits.softmax(dim=-1), prompts.answers).log()


METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "probability_difference": probability_difference,
    "answer_log_probability": answer_log_probability,
}


def _sum(values: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n width"]) -> Float[Tensor, "n"]:
    present = tokens != NO_TOKEN
    return (values.gather(1, tokens.clamp(min=0)) * present).sum(dim=1)


def _mean(values: Float[Tensor, "n vocab"], tokens: Int[Tensor, "n width"]) -> Float[Tensor, "n"]:
    return _sum(values, tokens) / (tokens != NO_TOKEN).sum(dim=1)


def mean_direction(tokens: Int[Tensor, "n width"], n_vocab: int) -> Float[Tensor, "n vocab"]:
    """Weights over the vocabulary whose inner product with the logits is the mean logit of `tokens`."""
    present = (tokens != NO_TOKEN).double()
    weights = present.new_zeros(tokens.shape[0], n_vocab)
    return weights.scatter_add_(1, tokens.clamp(min=0), present / present.sum(dim=1, keepdim=True))


def difference_direction(prompts: PromptSet, n_vocab: int) -> Float[Tensor, "n vocab"]:
    """Weights over the vocabulary whose inner product with the logits is the logit difference."""
    return mean_direction(prompts.answers, n_vocab) - mean_direction(prompts.wrong, n_vocab)
