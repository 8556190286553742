"""training.memory.sizing.choose: what size=auto chooses, by facts and a calculated speed."""

import pytest

from dalle.errors import HyperparameterError
from dalle.models.configs import DVAEConfig, TransformerConfig
from dalle.types import STAGES
from tests.training.memory.calculated_speed import CalculatedSpeed
from training.config.hyperparameters import parse
from training.config.models import TextSizes, dvae_config, stage_config
from training.memory.sizing import rules
from training.memory.sizing.choose import Given, choose
from training.memory.sizing.facts import Facts
from training.memory.sizing.timing import Timing

CORE = 30e9  # operations a second
GPU = 20e12
EMOJI = Facts(3304, side=64, longest_caption=19, text_vocab_size=3911, load_seconds=2.0)
RAINBOW = Facts(2765, side=32, longest_caption=7, text_vocab_size=397, is_drawing=True)
PHOTOS = Facts(100_000, side=375, longest_caption=40, text_vocab_size=8192)


def chosen(minutes, facts=EMOJI, speed=2 * CORE, names=STAGES, given=None, device="cpu", **raw):
    """The choice and the hyperparameters with it."""
    settings = parse({"max_minutes": str(minutes), **raw})
    if not isinstance(speed, CalculatedSpeed):
        speed = CalculatedSpeed(speed)
    choice = choose(settings, facts, names, speed, given=given, device_type=device)
    return choice, choice.apply(settings)


def weights(settings):
    transformer = settings.transformer
    return rules.layer_weights(transformer.width, transformer.num_layers)


def test_an_hour_of_two_cores_on_emoji_gives_what_was_found_by_hand():
    choice, settings = chosen(60)
    dvae = dvae_config(settings)
    assert (dvae.image_size, dvae.grid_size, dvae.num_codebooks) == (64, 8, 4)
    assert 2e6 <= weights(settings) <= 4e6
    assert settings.text_length == 20
    assert settings.dvae.ground_split is None


def test_nine_minutes_of_two_cores_on_shapes_give_about_the_recipe():
    _, settings = chosen(9, RAINBOW)
    dvae = dvae_config(settings)
    assert (dvae.image_size, dvae.grid_size, dvae.num_codebooks) == (32, 8, 3)
    assert dvae.ground_split
    assert 0.8e6 <= weights(settings) <= 2e6
    transformer = settings.transformer
    assert (transformer.batch_size, transformer.dropout, transformer.caption_dropout) == (16, 0, 0)
    assert settings.clip.likelihood_weight == 1


def test_more_minutes_and_faster_devices_never_give_smaller_models():
    for facts in (EMOJI, PHOTOS, RAINBOW):
        for speed, device in ((CORE, "cpu"), (GPU, "cuda")):
            found = [
                (dvae_config(settings).image_size, weights(settings))
                for minutes in (20, 60, 300, 3_000)
                for _, settings in [chosen(minutes, facts, speed, device=device)]
            ]
            assert found == sorted(found)


def test_a_size_is_never_beyond_the_pictures_and_grows_with_the_device():
    sizes = [
        dvae_config(chosen(60, PHOTOS, speed, device="cuda")[1]).image_size
        for speed in (CORE, 10 * CORE, GPU)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 256
    assert dvae_config(chosen(60, EMOJI, GPU)[1]).image_size == 64
    tiny = Facts(500, side=20, longest_caption=5, text_vocab_size=300)
    assert dvae_config(chosen(60, tiny, GPU)[1]).image_size == 32


def test_few_pictures_get_a_small_model_however_fast_the_device_is():
    few = Facts(50, side=64, longest_caption=5, text_vocab_size=300)
    _, settings = chosen(600, few, GPU)
    assert weights(settings) <= 1.2 * rules.SMALLEST_CAP
    assert settings.transformer.batch_size <= 50 // rules.BATCHES_PER_EPOCH
    many, _ = chosen(600, PHOTOS, GPU)[1], None
    assert weights(many) > 10 * weights(settings)


@pytest.mark.parametrize(
    "raw",
    [
        {"image_size": "48"},
        {"transformer_width": "100", "num_layers": "3"},
        {"dvae_width": "72", "num_codebooks": "2", "codebook_size": "64"},
        {"batch_size": "8", "learning_rate": "0.001", "text_length": "33"},
        {"clip_vision_width": "192", "clip_patch_size": "16"},
        {"dvae_size": "tiny"},
        {"num_downsamples": "2", "num_validations": "3", "warmup_steps": "7"},
        {"transformer_batch_size": "auto"},
    ],
)
def test_what_is_set_by_hand_stays_and_the_models_can_be_built(raw):
    _, settings = chosen(60, **raw)
    by_hand = parse({"max_minutes": "60", **raw})
    for name in raw:
        if name in ("text_length", "num_validations"):
            assert getattr(settings, name) == getattr(by_hand, name)
            continue
        for stage in STAGES:
            plain = name.removeprefix(f"{stage}_")
            if plain != name or hasattr(settings.of(stage), name):
                field = getattr(settings.of(stage), plain, None)
                if f"{stage}_{plain}" == name or name == plain:
                    assert field == getattr(by_hand.of(stage), plain, None)
    dvae = dvae_config(settings)
    text = TextSizes(3911, settings.text_length)
    for stage in STAGES:
        stage_config(stage, settings, text, dvae)


def test_minutes_are_shared_and_nothing_of_them_is_forgotten():
    choice, settings = chosen(60)
    assert sum(choice.shares.values()) == pytest.approx(1)
    assert choice.shares["transformer"] > choice.shares["dvae"] > choice.shares["clip"]
    one, _ = chosen(60, names=["clip"])
    assert one.shares == {"clip": 1}
    own, _ = chosen(60, dvae_max_minutes="20")
    assert own.shares == pytest.approx({"transformer": 0.8, "clip": 0.2})
    assert choice.reserve_seconds < 6 * 60


def test_a_choice_says_what_and_why_in_five_sentences():
    choice, _ = chosen(60)
    facts, device, pictures, transformer, minutes = choice.why
    assert "3,304 pairs" in facts
    assert "19 tokens, of 20 that models read" in facts
    assert device.startswith("a calculated device reaches 60 GFLOP/s")
    assert "64 pixels, 8 x 8 positions of 4 codes out of 256; a larger size" in pictures
    assert "million weights; the data bear 3.4 million" in transformer
    assert minutes.startswith("Of 60 minutes: dvae ")
    small, _ = chosen(8)
    assert "Pictures of 32 pixels" in small.why[2]
    assert "64 pixels would take some " in small.why[2]


def test_too_few_minutes_are_refused_with_how_many_are_needed():
    with pytest.raises(HyperparameterError, match=r"max_minutes=0.1 is too few: on a calculated"):
        chosen(0.1)
    with pytest.raises(HyperparameterError) as refused:
        chosen(0.5)
    needed = float(str(refused.value).rpartition("max_minutes=")[2].split()[0])
    assert 0.5 < needed < 5
    choice, _ = chosen(needed)
    assert choice.minutes == needed
    with pytest.raises(HyperparameterError, match="max_minutes=5 is too few"):
        chosen(5, speed=CORE / 1000)


def test_a_transformer_that_the_memory_does_not_hold_is_not_chosen():
    speed = CalculatedSpeed(GPU, most_weights=12e6)
    _, settings = chosen(600, PHOTOS, speed, device="cuda")
    assert 5e6 < weights(settings) <= 12e6
    with pytest.raises(HyperparameterError, match="the memory of a calculated device is too small"):
        chosen(600, PHOTOS, CalculatedSpeed(GPU, most_weights=1), device="cuda")


def test_several_devices_get_batches_that_divide_evenly_and_see_more():
    settings = parse({"max_minutes": "60"})
    alone = choose(settings, EMOJI, STAGES, CalculatedSpeed(CORE))
    four = choose(settings, EMOJI, STAGES, CalculatedSpeed(CORE), num_ranks=4)
    settled = four.apply(settings)
    assert all(settled.of(name).batch_size % 4 == 0 for name in STAGES)
    assert weights(settled) >= weights(alone.apply(settings))


def test_the_sizes_of_a_given_image_tokenizer_are_not_chosen():
    dvae = DVAEConfig(image_size=128, patch_size=8, num_downsamples=1, codebook_size=512)
    speed = CalculatedSpeed(10 * CORE)
    choice, settings = chosen(
        60, PHOTOS, speed, names=["transformer", "clip"], given=Given(dvae=dvae)
    )
    assert settings.dvae.image_size is None
    assert "the channels bring the image tokenizer" in choice.why[2]
    transformers = [c for s, c, _ in speed.asked if s == "transformer"]
    assert (transformers[-1].grid_size, transformers[-1].codebook_size) == (8, 512)


def test_a_transformer_that_is_trained_on_keeps_its_sizes():
    config = TransformerConfig(
        text_vocab_size=300, text_length=16, grid_size=8, codebook_size=64, width=64, num_layers=2
    )
    dvae = DVAEConfig(image_size=64, patch_size=8, num_downsamples=0, codebook_size=64)
    choice, settings = chosen(10, names=["transformer"], given=Given(dvae=dvae, transformer=config))
    assert settings.transformer.overrides() == {}
    assert choice.shares == {"transformer": 1}


def test_a_gpu_takes_larger_batches_and_a_long_run_too():
    _, cpu = chosen(60)
    _, gpu = chosen(60, PHOTOS, GPU, device="cuda")
    assert gpu.transformer.batch_size > cpu.transformer.batch_size
    assert gpu.clip.batch_size > cpu.clip.batch_size


def test_validations_take_a_small_share_of_each_stage():
    _, long = chosen(60)
    _, short = chosen(5)
    assert long.num_validations == 10
    assert short.num_validations == 4


def test_the_time_of_a_larger_size_is_some_ten_times_as_long():
    facts = Facts(50_000, side=256, longest_caption=19, text_vocab_size=3911)
    settings = parse({"max_minutes": "60"})
    from training.memory.sizing.choose import Chooser

    timing = Timing(settings, facts, STAGES, 60.0, 1, "cpu")
    chooser = Chooser(settings, facts, STAGES, CalculatedSpeed(2 * CORE), Given(), timing)
    chooser.measure_probe()
    seconds = [chooser.seconds_for(size) for size in (32, 64, 128, 256)]
    assert 30 * 60 < seconds[1] < 90 * 60
    ratios = [later / earlier for earlier, later in zip(seconds, seconds[1:], strict=False)]
    assert all(2 < ratio < 20 for ratio in ratios)
