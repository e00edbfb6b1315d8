"""Training side by side with SAELens' own trainer, on the same batches with the same schedule."""

from collections.abc import Iterator

import torch

from sae import TopK
from sae.config import TrainConfig
from sae.training import train

STEPS, BATCH, D_SAE, K, LR = 300, 256, 128, 4, 3e-3


def saelens_fvu(source, x: torch.Tensor, seed: int) -> float:
    """FVU of SAELens' TopK after training with a constant learning rate and its other settings as they are."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=source.d_in, d_sae=D_SAE, k=K))
    config = SAETrainerConfig(total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=LR, lr_end=LR)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield source.next_batch(BATCH)

    trained = SAETrainer(config, sae, batches()).fit()
    with torch.no_grad():
        return ((x - trained(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


def test_topk_reaches_saelens_error_after_equal_steps(planted) -> None:
    x = planted().held_out(4000)
    theirs = [saelens_fvu(planted(), x, seed) for seed in range(3)]
    configs = [
        TrainConfig(
            name=str(seed), total_tokens=STEPS * BATCH, batch_size=BATCH, d_sae=D_SAE, rule=TopK(K), lr=LR,
            warmup=0.0, decay=0.0, seed=seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    ours = [
        ((x - result.sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
        for result in train(configs, planted())
    ]
    spread = max(theirs) - min(theirs)
    assert sum(ours) / 3 <= sum(theirs) / 3 + spread
