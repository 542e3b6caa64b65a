"""The arguments of MemoryTrainer that `TrainingArguments` does not have. Can be imported without torch."""

from dataclasses import dataclass, field

from transformers.training_args import TrainingArguments


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and:

    Args:
        learning_rate (`float`), num_train_epochs (`float`): as in `TrainingArguments`; the defaults are the paper's
            for GPT-2 XL and WikiText. Next to a small Gen, about 1e-3 is needed.
        per_device_train_batch_size, per_device_eval_batch_size (`int`): keys of a step.
        kl_weight (`float`): a, from 0 to 1: the loss is (1 - a) times the cross-entropy of the token after a key, plus
            a times KL(p_kNN ‖ p_mem). p_kNN is the datastore's prediction for the key without the key's own entry; it
            costs a search for every key and epoch.
        validation_split (`float`): share of the keys to hold out for evaluation, in whole documents drawn at random.
            p_kNN still finds them.

    Raises:
        `ValueError`: for a share or weight that is out of range.
    """

    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the keys."})
    learning_rate: float = field(default=1e-5, metadata={"help": "The paper's for GPT-2 XL; a small Gen needs 1e-3."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Keys per step and device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Keys per evaluation step and device."})
    kl_weight: float = field(
        default=0.0, metadata={"help": "Share of KL(p_kNN || p_mem) in the loss; the rest is cross-entropy."}
    )
    validation_split: float = field(
        default=0.0, metadata={"help": "Share of the keys to hold out for evaluation, in whole documents."}
    )

    def __post_init__(self) -> None:
        import torch

        if not 0 <= self.kl_weight <= 1:
            raise ValueError(f"kl_weight is {self.kl_weight}, expected a number from 0 to 1.")
        if not 0 <= self.validation_split < 1:
            raise ValueError(f"validation_split is {self.validation_split}, expected a share from 0 to below 1.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise TrainingArguments refuses bf16 on a CPU
        self.remove_unused_columns = False  # a batch holds more than the memory's forward takes
        super().__post_init__()
