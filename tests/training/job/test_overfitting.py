"""training.job.overfitting: a validation loss that rose is said, with what helps."""

import pytest

from dalle.models.configs import TransformerConfig
from training.config.hyperparameters import parse
from training.config.models import dvae_config
from training.job.overfitting import overfitting
from training.loop.interface import FitResult, Validation


def transformer(dropout):
    return TransformerConfig(
        text_vocab_size=9, text_length=3, grid_size=2, codebook_size=4, dropout=dropout
    )


def result(best, newest, kept_step=400):
    return FitResult(1000, 9.0, 9.0, True, kept_step, best=best, newest=newest)


def validation(step, epoch, loss):
    return Validation(step, epoch, {"validation_loss": 9.0, "validation_image_loss": loss})


BEST = validation(400, 12.0, 2.0)


def test_a_loss_that_rose_names_step_epoch_losses_and_what_helps():
    said = overfitting("transformer", result(BEST, validation(1000, 30.0, 2.5)), transformer(0.0))
    assert said == (
        "transformer overfits: its validation loss rose after step 400 (epoch 12), from 2 to 2.5 "
        "at step 1,000; the weights of step 400 are kept. What helps: more pictures, or "
        "dropout=0.2 (it was 0)"
    )


@pytest.mark.parametrize("newest", [BEST, validation(1000, 30.0, 2.03), None])
def test_a_loss_that_hardly_rose_is_not_said(newest):
    assert overfitting("transformer", result(BEST, newest), transformer(0.0)) == ""


def test_dropout_is_raised_as_long_as_that_is_sensible():
    newest = validation(1000, 30.0, 2.5)
    assert "dropout=0.3 (it was 0.15)" in overfitting(
        "transformer", result(BEST, newest), transformer(0.15)
    )
    said = overfitting("transformer", result(BEST, newest), transformer(0.5))
    assert said.endswith("more pictures, or transformer_max_steps=400")


def test_weights_that_are_kept_although_they_overfit_are_said():
    newest = Validation(1000, 30.0, {"validation_loss": 2.5})
    best = Validation(400, 12.0, {"validation_loss": 2.0})
    said = overfitting("dvae", result(best, newest, kept_step=1000), dvae_config(parse({})))
    assert "the weights of step 1,000 are kept; keep=best would keep those of" in said
    assert said.endswith("more pictures, or dvae_max_steps=400")
