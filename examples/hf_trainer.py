"""Hugging Face's Trainer: a SegFormer learns from a UPerNet, with gradient accumulation.

The two lines are those marked `dsct`. `pip install transformers accelerate`; python examples/hf_trainer.py
"""

import tempfile

import torch
import transformers as hf

from dsct_kernels import dsct_loss  # dsct


class Distilling(hf.Trainer):
    # A micro-batch's mean: the Trainer has to divide it by the accumulation steps. It would not, since SegFormer takes
    # **kwargs, and so might have used num_items_in_batch (which counts labels that are not -100; here 255 is ignored).
    loss_is_scaled_for_ga = False

    def __init__(self, *args, teacher, **keywords):
        super().__init__(*args, **keywords)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        student = model(**inputs, output_hidden_states=True)  # without labels: no loss of its own
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True)
        features = student.hidden_states, teacher.hidden_states[1:]  # four stages each; the first is the stem
        losses = dsct_loss(student.logits, teacher.logits, labels, *features)  # dsct
        return (losses.total, student) if return_outputs else losses.total


def networks():
    torch.manual_seed(0)
    encoder = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    student = hf.SegformerConfig(**encoder, decoder_hidden_size=16, num_labels=6)
    resnet = hf.ResNetConfig(**encoder, embedding_size=8, layer_type="basic", out_indices=[1, 2, 3, 4])
    teacher = hf.UperNetConfig(backbone_config=resnet, hidden_size=16, use_auxiliary_head=False, num_labels=6)
    return hf.SegformerForSemanticSegmentation(student), hf.UperNetForSemanticSegmentation(teacher)


def samples(count=8):
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(count, 3, 64, 64, generator=generator), torch.randint(0, 6, (count, 64, 64))
    labels[:, :5] = 255  # no label there
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]


def main(**settings):
    student, teacher = networks()
    with tempfile.TemporaryDirectory() as out:
        defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
        arguments = hf.TrainingArguments(out, report_to=[], save_strategy="no", **{**defaults, **settings})
        Distilling(student, arguments, train_dataset=samples(), teacher=teacher).train()
    return student


if __name__ == "__main__":
    main(logging_steps=1)
