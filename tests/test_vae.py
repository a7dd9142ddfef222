"""vae.py: the autoencoder against its peer, against brute force, and on disk."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import close, complaint, randn, randomise, read_fixture
from safetensors.torch import load_file, save_file

import checkpoint
from orthus import OrthusConfig
from vae import VQVAE, Downsample, Upsample, VQVAEConfig


def small_config(**changes) -> VQVAEConfig:
    """32 px, f = 8: 4 x 4 latents of 8 channels."""
    sizes = dict(
        resolution=32,
        base_channels=8,
        channel_multiplier=(1, 2, 1, 1),
        num_res_blocks=1,
        latent_channels=8,
        num_codes=64,
        groups=4,
    )
    return VQVAEConfig(**(sizes | changes))


@pytest.fixture
def vae() -> VQVAE:
    return randomise(VQVAE(small_config()))


# --- Against transformers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict:
    return read_fixture("vqvae")[0]


@pytest.fixture(scope="module")
def peer(recorded) -> VQVAE:
    """The autoencoder with the weights of the fixture, which has no decoder."""
    hub = read_fixture("vqvae")[1]
    names = ("resolution", "base_channels", "channel_multiplier", "num_res_blocks")
    sizes = {name: hub[name] for name in (*names, "latent_channels")}
    model = VQVAE(VQVAEConfig(**sizes, num_codes=hub["num_embeddings"]))
    weights = {name: t for name, t in recorded.items() if "." in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("decoder.") for name in missing)
    return model


def test_encoder_equals_that_of_transformers(peer, recorded):
    close(peer.encode(recorded["images"]), recorded["latents"], atol=1e-5)


def test_codes_equal_those_of_transformers(peer, recorded):
    assert torch.equal(peer.quantize(peer.encode(recorded["images"])), recorded["codes"])


# --- Shapes and order ----------------------------------------------------------------------------


def test_encode_gives_one_latent_per_f_by_f_pixels(vae):
    latents = vae.encode(randn(2, 3, 32, 32))
    assert latents.shape == (2, vae.config.latents_per_image, 8) == (2, 16, 8)


def test_decode_gives_back_the_image_size(vae):
    assert vae.decode(randn(2, 16, 8)).shape == (2, 3, 32, 32)


def test_latents_are_row_major(vae):
    grid = randn(2, 8, 4, 4)  # in place of an image, past an encoder that changes nothing
    vae.encoder = torch.nn.Identity()
    torch.nn.init.dirac_(vae.quant_conv.weight)
    torch.nn.init.zeros_(vae.quant_conv.bias)
    latents = vae.encode(grid)
    for row, column in ((0, 3), (2, 1), (3, 0)):
        close(latents[:, 4 * row + column], grid[:, :, row, column])


@pytest.fixture
def local(vae) -> VQVAE:
    """The same with weak neighbours, so that a change stays near its place."""
    for name, p in vae.named_parameters():
        if p.shape[-2:] == (3, 3):
            p.data *= 0.1 + 0.9 * F.one_hot(torch.tensor(4), 9).view(3, 3)  # 1 in the centre
        elif "proj_out" in name:
            p.data *= 0.1
    return vae


@pytest.mark.parametrize("row, column", [(0, 3), (2, 1), (3, 0)])
def test_decode_puts_a_row_major_latent_where_it_belongs(local, row, column):
    latents = randn(1, 16, 8)
    moved = latents.clone()
    moved[:, 4 * row + column] += 3 * randn(8, seed=1)
    change = (local.decode(moved) - local.decode(latents)).square().sum(1)
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
    images = randn(3, 3, 32, 32)
    close(vae.encode(images)[1:2], vae.encode(images[1:2]), atol=1e-5)


def test_decode_refuses_a_count_that_is_not_square(vae):
    assert "12 latents" in complaint(lambda: vae.decode(randn(1, 12, 8)))


def test_downsampling_pads_right_and_below_only():
    layer, image = Downsample(1), randn(1, 1, 6, 6)
    torch.nn.init.zeros_(layer.conv.bias)
    for row, column in ((0, 0), (2, 2)):  # a kernel that picks one corner of its 3 x 3 window
        layer.conv.weight.data.zero_()[0, 0, row, column] = 1
        close(layer(image), F.pad(image, (0, 1, 0, 1))[..., row::2, column::2][..., :3, :3], 0)


# --- Quantisation --------------------------------------------------------------------------------


def nearest(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Brute force in fp64: (N, C), (K, C) -> (N,)."""
    difference = latents.double()[:, None] - codebook.double()
    return difference.square().sum(-1).argmin(-1)


def test_quantize_finds_the_nearest_code(vae):
    latents = randn(2, 200, 8)
    codes = vae.quantize(latents)
    assert codes.shape == (2, 200)
    codebook = vae.quantize.embedding.weight
    assert torch.equal(codes.flatten(), nearest(latents.flatten(0, 1), codebook))


def test_lookup_of_a_quantised_code_is_that_code(vae):
    codes = torch.arange(64).view(4, 16)
    latents = vae.lookup(codes)
    assert torch.equal(latents, vae.quantize.embedding.weight.view(4, 16, 8))
    assert torch.equal(vae.quantize(latents), codes)


def test_quantize_measures_in_fp32_under_autocast_and_on_bf16_latents():
    quantize = randomise(VQVAE(small_config(latent_channels=64, num_codes=512))).quantize
    latents = randn(500, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantize(latents)
    codebook = quantize.embedding.weight
    assert torch.equal(codes, nearest(latents, codebook))
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
    vae, orthus = VQVAEConfig.preset(name), OrthusConfig.preset(name)
    for name in ("latent_channels", "num_codes", "latents_per_image"):
        assert getattr(vae, name) == getattr(orthus, name)


def test_attention_stands_in_the_middle_block_only():
    names = [n for n, _ in VQVAE(small_config()).named_modules() if n.endswith("proj_out")]
    assert names == ["encoder.mid.attn_1.proj_out", "decoder.mid.attn_1.proj_out"]


def test_levels_resample_where_the_released_names_say(vae):
    encoder = [hasattr(level, "downsample") for level in vae.encoder.down]
    decoder = [hasattr(level, "upsample") for level in vae.decoder.up]  # 0 is the full resolution
    assert encoder == [True, True, True, False] and decoder == [False, True, True, True]
    assert [len(level.block) for level in (*vae.encoder.down, *vae.decoder.up)] == [1] * 4 + [2] * 4


def test_upsampling_repeats_pixels_then_convolves():
    layer, image = Upsample(2), randn(1, 2, 3, 3)
    repeated = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    close(layer(image), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


def test_wrong_sizes_raise_with_the_values():
    assert "36" in complaint(lambda: small_config(resolution=36))
    assert "channel_multiplier is ()" in complaint(lambda: small_config(channel_multiplier=()))
    assert "8 channels" in complaint(lambda: small_config(groups=3))
    assert "'huge'" in complaint(lambda: VQVAEConfig.preset("huge"))


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


def test_a_dtype_may_be_asked_for(saved):
    again = VQVAE.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_checkpoint_without_decoder_names_what_is_missing(saved):
    path = saved / checkpoint.VAE
    save_file({k: v for k, v in load_file(path).items() if "decoder" not in k}, path)
    assert "missing decoder.conv_in.weight [8, 8, 3, 3]" in complaint(
        lambda: VQVAE.from_pretrained(saved)
    )


@pytest.mark.parametrize("value, wanted", [(float("nan"), "not finite"), (1, "int64")])
def test_weights_that_are_no_finite_numbers_are_refused(saved, value, wanted):
    path = saved / checkpoint.VAE
    tensors = load_file(path)
    tensors["quant_conv.bias"] = torch.full((8,), value)
    save_file(tensors, path)
    message = complaint(lambda: VQVAE.from_pretrained(saved))
    assert "quant_conv.bias" in message and wanted in message


@pytest.mark.parametrize("size, value", [
    ("num_res_blocks", 10**6), ("channel_multiplier", [2**24] * 4), ("base_channels", 2**24),
])  # fmt: skip
def test_a_config_that_asks_for_what_nothing_can_hold_is_refused_at_once(saved, size, value):
    config = checkpoint.read_json(saved / checkpoint.CONFIG)
    config["vae"][size] = value
    checkpoint.write_json(saved / checkpoint.CONFIG, config)
    message = complaint(lambda: VQVAE.from_pretrained(saved))
    assert size in message and str(saved) in message


def test_a_cut_off_file_raises_with_its_path(saved):
    path = saved / checkpoint.VAE
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in complaint(lambda: VQVAE.from_pretrained(saved))


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
