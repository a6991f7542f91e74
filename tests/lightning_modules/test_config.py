"""Arguments as dataclasses and as plain values."""

from dataclasses import asdict

import pytest
import torch

from layers.tokenizers.base import Tokenizer
from layers.tokenizers.pixels import PixelTokenizer
from lightning_modules.config import as_config, as_tokenizer, tokenizer_config, unknown_key
from lightning_modules.jit import JiTConfig, JiTObjective, JiTSampling
from lightning_modules.optim import OptimConfig


def test_an_instance_is_returned_as_it_is():
    config = JiTConfig(depth=6)
    assert as_config(JiTConfig, config) is config


@pytest.mark.parametrize(
    "config",
    [JiTConfig(depth=6), JiTObjective("v", "x"), JiTSampling("euler", 3, 2.0, (0.2, 0.9)), OptimConfig(lr=0.1)],
)
def test_plain_values_give_back_the_instance(config):
    assert as_config(type(config), asdict(config)) == config


def test_missing_fields_take_their_defaults():
    assert as_config(JiTSampling, {"num_steps": 7}) == JiTSampling(num_steps=7)


def test_whole_numbers_become_floats_and_lists_become_tuples():
    sampling = as_config(JiTSampling, {"cfg_scale": 2, "cfg_interval": [0, 1]})
    assert sampling == JiTSampling(cfg_scale=2.0, cfg_interval=(0.0, 1.0))
    assert [type(v) for v in (sampling.cfg_scale, sampling.cfg_interval, *sampling.cfg_interval)] == [
        float,
        tuple,
        float,
        float,
    ]


def test_optional_numbers_take_none_and_whole_numbers():
    optim = as_config(OptimConfig, {"lr": 1, "blr": None})
    assert (optim.lr, optim.blr, type(optim.lr)) == (1.0, None, float)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (JiTConfig, {"depth": 2.0}, "JiTConfig.depth is 2.0, expected int"),
        (JiTConfig, {"depth": "4"}, "JiTConfig.depth is '4', expected int"),
        (JiTConfig, {"depth": True}, "JiTConfig.depth is True, expected int"),
        (JiTConfig, {"depth": None}, "JiTConfig.depth is None, expected int"),
        (JiTObjective, {"t_eps": "5e-2"}, "JiTObjective.t_eps is '5e-2', expected float"),
        (JiTObjective, {"t_eps": False}, "JiTObjective.t_eps is False, expected float"),
        (JiTObjective, {"prediction": "y"}, "JiTObjective.prediction is 'y', expected one of x, eps, v"),
        (JiTSampling, {"cfg_interval": [0.1]}, "JiTSampling.cfg_interval is [0.1], expected tuple"),
        (JiTSampling, {"cfg_interval": [0.1, "a"]}, "JiTSampling.cfg_interval is 'a', expected float"),
        (OptimConfig, {"lr": "big"}, "OptimConfig.lr is 'big', expected float"),
    ],
)
def test_a_value_of_another_type_is_an_error_naming_field_value_and_type(cls, values, message):
    with pytest.raises(ValueError) as error:
        as_config(cls, values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("cls", "name", "nearest"),
    [(JiTConfig, "dept", "depth"), (JiTConfig, "number_heads", "num_heads"), (JiTSampling, "cfg", "cfg_scale")],
)
def test_an_unknown_field_is_an_error_naming_the_nearest(cls, name, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{cls.__name__}\.{name}'.*\.{nearest}\b"):
        as_config(cls, {name: 1})


def test_without_a_near_key_all_are_listed():
    assert unknown_key("zzz", ["alpha", "beta"]) == "unknown key 'zzz'; known: alpha, beta"


@pytest.mark.parametrize("value", [{"cfg_scale": float("nan")}, JiTSampling(cfg_scale=float("nan"))])
def test_not_a_number_is_no_setting(value):
    with pytest.raises(ValueError, match=r"JiTSampling.cfg_scale is not a number \(NaN\)"):
        as_config(JiTSampling, value)


def test_values_checked_by_the_dataclass_are_checked_here_too():
    with pytest.raises(ValueError, match="in_context_start is 9"):
        as_config(JiTConfig, {"depth": 4, "in_context_start": 9})


def test_tokenizer_config_rebuilds_the_tokenizer_and_is_plain(tmp_path):
    config = tokenizer_config(PixelTokenizer(12, 3, channels=1))
    torch.save(config, tmp_path / "config")
    again = as_tokenizer(torch.load(tmp_path / "config", weights_only=True))
    assert isinstance(again, PixelTokenizer) and (again.image_size, again.patch_size, again.channels) == (12, 3, 1)


def test_a_tokenizer_is_returned_as_it_is():
    tokenizer = Tokenizer()
    assert as_tokenizer(tokenizer) is tokenizer


@pytest.mark.parametrize(
    "class_path",
    ["subprocess.Popen", "os.system", "layers.patch.patchify", "layers.tokenizers_of_others.X", "PixelTokenizer"],
)
def test_only_classes_below_layers_tokenizers_are_imported(class_path):
    with pytest.raises(ValueError, match=r"is no tokenizer class in layers\.tokenizers: not loaded"):
        as_tokenizer({"class_path": class_path, "init_args": {}})
