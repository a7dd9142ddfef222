"""vae.py: the autoencoder against its peer, against brute force, and on disk."""

import dataclasses

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import ROOT, close, complaint, edit_json, randn, randomise, read_fixture
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
import data
from orthus import OrthusConfig
from vae import VQVAE, Downsample, Upsample, VQVAEConfig


def small_config(**changes) -> VQVAEConfig:
    """32 px, f = 8: 4 x 4 latents of 8 channels."""
    sizes = dict(resolution=32, base_channels=8, channel_multiplier=(1, 2, 1, 1), groups=4)
    sizes |= dict(num_res_blocks=1, latent_channels=8, num_codes=64)
    return VQVAEConfig(**(sizes | changes))


@pytest.fixture
def vae() -> VQVAE:
    return randomise(VQVAE(small_config()))


# --- Against transformers, and order -------------------------------------------------------------


def test_encoder_and_codes_equal_those_of_transformers():
    """With the weights of the fixture, which has no decoder."""
    recorded, hub = read_fixture("vqvae")
    names = "resolution", "base_channels", "channel_multiplier", "num_res_blocks"
    sizes = {name: hub[name] for name in (*names, "latent_channels")}
    model = VQVAE(VQVAEConfig(**sizes, num_codes=hub["num_embeddings"]))
    weights = {name: t for name, t in recorded.items() if "." in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("decoder.") for name in missing)
    latents = model.encode(recorded["images"])
    close(latents, recorded["latents"], atol=1e-5)
    assert torch.equal(model.quantize(latents), recorded["codes"])


def test_one_latent_per_f_by_f_pixels_there_and_back(vae):
    latents = vae.encode(randn(2, 3, 32, 32))
    assert latents.shape == (2, vae.config.latents_per_image, 8) == (2, 16, 8)
    assert vae.decode(latents).shape == (2, 3, 32, 32)
    assert "12 latents" in complaint(lambda: vae.decode(randn(1, 12, 8)))


def test_latents_are_row_major(vae):
    grid = randn(2, 8, 4, 4)  # in place of an image, past an encoder that changes nothing
    vae.encoder = torch.nn.Identity()
    torch.nn.init.dirac_(vae.quant_conv.weight)
    torch.nn.init.zeros_(vae.quant_conv.bias)
    latents = vae.encode(grid)
    for row, column in ((0, 3), (2, 1), (3, 0)):
        close(latents[:, 4 * row + column], grid[:, :, row, column])


@pytest.mark.parametrize("row, column", [(0, 3), (2, 1), (3, 0)])
def test_decode_puts_a_row_major_latent_where_it_belongs(vae, row, column):
    for name, p in vae.named_parameters():  # weak neighbours, so that a change stays near its place
        if p.shape[-2:] == (3, 3):
            p.data *= 0.1 + 0.9 * F.one_hot(torch.tensor(4), 9).view(3, 3)  # 1 in the centre
        elif "proj_out" in name:
            p.data *= 0.1
    latents = randn(1, 16, 8)
    moved = latents.clone()
    moved[:, 4 * row + column] += 3 * randn(8, seed=1)
    change = (vae.decode(moved) - vae.decode(latents)).square().sum(1)
    patch = F.avg_pool2d(change, 8)[0]  # (4, 4): one number for each latent's pixels
    assert patch.argmax() == 4 * row + column


def test_decode_goes_through_the_post_quant_convolution(vae):
    latents, conv = randn(1, 16, 8), vae.post_quant_conv
    by_hand = latents @ conv.weight[:, :, 0, 0].T + conv.bias
    image = vae.decode(latents)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    close(vae.decode(by_hand), image, atol=1e-4)


def test_images_of_a_batch_do_not_influence_each_other(vae):
    images, latents = randn(3, 3, 32, 32), randn(3, 16, 8)
    close(vae.encode(images)[1:2], vae.encode(images[1:2]), atol=1e-5)
    close(vae.decode(latents)[1:2], vae.decode(latents[1:2]), atol=1e-4)


def test_downsampling_pads_right_and_below_only():
    layer, image = Downsample(1), randn(1, 1, 6, 6)
    torch.nn.init.zeros_(layer.conv.bias)
    for row, column in ((0, 0), (2, 2)):  # a kernel that picks one corner of its 3 x 3 window
        layer.conv.weight.data.zero_()[0, 0, row, column] = 1
        close(layer(image), F.pad(image, (0, 1, 0, 1))[..., row::2, column::2][..., :3, :3], 0)


def test_upsampling_repeats_pixels_then_convolves():
    layer, image = Upsample(2), randn(1, 2, 3, 3)
    repeated = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(layer(image), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


# --- Quantisation --------------------------------------------------------------------------------


def nearest(latents: torch.Tensor, codebook: torch.Tensor) -> list[int]:
    return [int(reference.distances(latent, codebook).argmin()) for latent in latents]


def test_quantize_finds_the_nearest_code_which_lookup_gives_back(vae):
    latents, codebook = randn(2, 100, 8), vae.quantize.embedding.weight
    codes = vae.quantize(latents)
    assert codes.flatten().tolist() == nearest(latents.flatten(0, 1), codebook)
    assert torch.equal(vae.lookup(codes), codebook[codes])
    assert torch.equal(vae.quantize(vae.lookup(codes)), codes)


def test_quantize_measures_in_fp32_under_autocast_and_on_bf16_latents():
    quantize = randomise(VQVAE(small_config(latent_channels=64, num_codes=512))).quantize
    latents, codebook = randn(500, 64).bfloat16(), quantize.embedding.weight
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantize(latents)
    assert codes.tolist() == nearest(latents, codebook)
    rounded = codebook.bfloat16()
    in_bf16 = (2 * latents @ rounded.T - rounded.square().sum(-1)).argmax(-1)
    assert (in_bf16 != codes).any()  # or this test would show nothing


def test_encode_does_not_quantise(vae):
    latents = vae.encode(randn(1, 3, 32, 32))
    assert (latents - vae.lookup(vae.quantize(latents))).abs().max() > 0.1


# --- Configurations ------------------------------------------------------------------------------


def test_chameleon_preset_is_the_released_autoencoder():
    config = VQVAEConfig.preset("7b")
    with torch.device("meta"):
        vae = VQVAE(config)
    assert (config.downsampling, config.latents_per_image) == (16, 1024)
    count = sum(p.numel() for p in vae.parameters())
    assert count // 10**6 == 68 and round(4 * count / 1e6) == 275  # MB in fp32, as published
    assert vae.quantize.embedding.weight.shape == (8192, 256)


@pytest.mark.parametrize("name", ["7b", "tiny", "nano"])
def test_autoencoder_and_transformer_presets_fit_each_other(name):
    data.check_fits(OrthusConfig.preset(name), VQVAEConfig.preset(name), "here")
    other = OrthusConfig.preset(name, latents_per_image=9)
    assert "latents_per_image is 9" in complaint(
        lambda: data.check_fits(other, VQVAEConfig.preset(name), "here")
    )


def test_the_shipped_tensors_have_the_names_and_shapes_of_the_autoencoder():
    with safe_open(ROOT / "checkpoints" / "tiny" / checkpoint.VAE, "pt") as file:
        shipped = {name: file.get_slice(name).get_shape() for name in file.keys()}
    with torch.device("meta"):
        vae = VQVAE(VQVAEConfig.preset("tiny"))
    assert shipped == {name: list(t.shape) for name, t in vae.state_dict().items()}


def test_parts_stand_where_the_released_names_say(vae):
    names = [n for n, _ in vae.named_modules() if n.endswith("proj_out")]
    assert names == ["encoder.mid.attn_1.proj_out", "decoder.mid.attn_1.proj_out"]
    encoder = [hasattr(level, "downsample") for level in vae.encoder.down]
    decoder = [hasattr(level, "upsample") for level in vae.decoder.up]  # 0 is the full resolution
    assert encoder == [True, True, True, False] and decoder == [False, True, True, True]
    assert [len(level.block) for level in (*vae.encoder.down, *vae.decoder.up)] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("fields, wanted", [(dict(resolution=36), "36"), (dict(groups=3), "3")])
def test_sizes_that_do_not_go_together_raise_with_the_values(fields, wanted):
    assert wanted in complaint(lambda: small_config(**fields))


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def saved(vae, tmp_path):
    config = {"vae": dataclasses.asdict(vae.config)}
    checkpoint.write(tmp_path, config, vae=vae.state_dict())
    return tmp_path


def test_an_autoencoder_survives_the_disk_bit_for_bit(vae, saved):
    again = VQVAE.from_pretrained(saved)
    assert again.config == vae.config
    for name, wanted in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name], wanted), name
    images = randn(1, 3, 32, 32)
    assert torch.equal(again.encode(images), vae.encode(images))
    half = VQVAE.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_checkpoint_without_decoder_names_what_is_missing(saved):
    path = saved / checkpoint.VAE
    save_file({k: v for k, v in load_file(path).items() if "decoder" not in k}, path)
    message = complaint(lambda: VQVAE.from_pretrained(saved))
    assert "missing decoder.conv_in.weight [8, 8, 3, 3]" in message


@pytest.mark.parametrize("size, value", [("num_res_blocks", 10**6), ("base_channels", 2**24)])
def test_a_config_that_asks_for_what_nothing_can_hold_is_refused_at_once(saved, size, value):
    edit_json(saved / checkpoint.CONFIG, lambda c: c["vae"].update({size: value}))
    message = complaint(lambda: VQVAE.from_pretrained(saved))
    assert size in message and str(saved) in message


def test_a_fresh_autoencoder_is_one_of_orthogonal_convolutions_alone():
    """Its residual branches are closed, so that shapes come through before they are learned."""
    model = VQVAE(VQVAEConfig.preset("nano"))
    model.init_weights()
    weights = dict(model.named_parameters())
    closed = [n for n in weights if n.endswith(("conv2.weight", "proj_out.weight"))]
    assert closed and all(not weights[n].any() for n in closed)
    block = model.encoder.down[0].block[0]
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    assert torch.equal(block(x), x)
    conv = model.decoder.conv_in.weight.flatten(1)
    gram = conv @ conv.T / conv.square().sum(1).mean()
    close(gram, torch.eye(len(gram)), 1e-4)
