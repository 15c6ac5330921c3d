"""Knowledge distillation in a plain loop: two models, an optimiser, and dominie's losses.

The models are small and untrained, so that this runs anywhere in seconds; put your own in their
place. Neither holds logits: the losses take hidden states and heads, supervised positions only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dominie.data.batch import collate
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode_all
from dominie.losses import vocabulary_losses
from dominie.toyworld import materialise

CHATS = [
    [
        {"role": "user", "content": f"copy {a} {b}"},
        {"role": "assistant", "content": f"{a} {b}"},
    ]
    for a in range(6)
    for b in range(6)
]


def distil(folder: Path, steps: int = 60) -> list[float]:
    """Teach a small model what a larger one predicts.

    Returns:
        KL(teacher ‖ student) in nats per supervised token, step by step.
    """
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(materialise("toyworld:teacher", folder)).eval()
    student = AutoModelForCausalLM.from_pretrained(materialise("toyworld:student", folder))
    tokenizer = AutoTokenizer.from_pretrained(materialise("toyworld:student", folder))

    rows = encode_all(tokenizer, [Conversation(chat) for chat in CHATS])
    batch = collate([(0, row) for row in rows])  # labels are the next tokens, where supervised
    keep = batch.supervised
    with torch.no_grad():
        taught = teacher.model(**batch.model_inputs()).last_hidden_state[keep]

    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    curve = []
    for _ in range(steps):
        learnt = student.model(**batch.model_inputs()).last_hidden_state[keep]
        losses = vocabulary_losses(
            learnt,
            student.lm_head.weight,
            (taught, teacher.lm_head.weight),
            labels=batch.labels[keep],
        )
        # Sums: whoever steps divides once, by the supervised tokens of the whole step.
        loss = (losses.divergence + 0.0 * losses.next_token) / keep.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(losses.divergence.detach()) / int(keep.sum()))
    return curve


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        kl = distil(Path(scratch))
    print(f"KL to the teacher: {kl[0]:.4f} nats a token at the start, {kl[-1]:.4f} at the end")
