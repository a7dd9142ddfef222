"""What each stage trains, on what, by which loss."""

import random

import pytest
import torch
from conftest import close, randn, randomise, seeded
from PIL import Image
from torch import nn

import checkpoint
import data
import stages
from data import Segment
from orthus import Orthus, OrthusConfig
from stages import BaseSettings, PosttrainSettings
from vae import VQVAE, VQVAEConfig

COMMON = dict(preset="nano", device="cpu", dtype="float32", batch_size=6)


class Tasks:
    """Pictures to draw, to ask about and to edit, in turn, with words that a tokenizer has."""

    def example(self, index: int) -> list[Segment]:
        rng = random.Random(index)
        drawn = [Image.new("RGB", (32, 32), tuple(rng.choices(range(256), k=3))) for _ in range(2)]
        words, picture = Segment("a " * rng.randint(1, 9) + "b"), Segment(drawn[0])
        if index % 3 == 0:
            return [words, Segment(drawn[1], output=True)]
        if index % 3 == 1:
            return [picture, words, Segment("ab ba", output=True)]
        return [picture, words, Segment(drawn[1], output=True)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A Chameleon of nano's size with random weights, and an Orthus made of it."""
    folder = tmp_path_factory.mktemp("start")
    vae = randomise(VQVAE(VQVAEConfig.preset("nano")))
    kinds = dict(vision_embedding="argmin", image_head="tokens")
    model = Orthus(OrthusConfig.preset("nano", **kinds))
    model.vision_embedding.codebook.weight.data.copy_(vae.quantize.embedding.weight)
    texts = data.texts_of(Tasks(), 60)
    tokenizer = data.train_tokenizer([*texts, "Generate an image."], 60)
    config = {"model": vars(model.config), "vae": vars(vae.config), "generation": {}}
    checkpoint.write(folder, config, model.state_dict(), vae.state_dict(), tokenizer)
    return checkpoint.open_checkpoint(folder)


@pytest.fixture(scope="module")
def orthus_start(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orthus")
    model = stages.to_orthus(BaseSettings(**COMMON), Tasks(), start)
    randomise(model.image_head)
    config = start.config | {"model": vars(model.config)}
    tensors = model.state_dict(), start.tensors("vae"), start.tokenizer
    checkpoint.write(folder, config, *tensors)
    return checkpoint.open_checkpoint(folder)


def posttrain(start, **settings):
    return stages.PosttrainStage(PosttrainSettings(**COMMON | settings), Tasks(), start, False)


# --- Batches -------------------------------------------------------------------------------------


def test_parts_add_up_to_the_loss_of_the_whole_batch(orthus_start):
    """Text and image each, and their gradients: two and three parts equal one. Squared error has no
    noise of its own, so that parts can be compared."""
    found = []
    for parts in (1, 2, 3):
        stage = posttrain(orthus_start, micro_batches=parts, guidance_dropout=0.0)
        torch.manual_seed(0)
        stage.model.image_head = randomise(__import__("orthus").RegressionHead(stage.model.config))
        batch = stage.batch(Tasks(), 0)
        assert len(batch) == parts
        terms = [stage.losses(part, 0, seeded(1)) for part in batch]
        sum(t["loss"] for t in terms).backward()
        sums = {key: sum(t[key].item() for t in terms) for key in ("loss", "text", "image")}
        found.append(
            (sums, stage.model.lm_head.weight.grad, stage.model.layers[0].mlp.up_proj.weight.grad)
        )
        lengths = [int((p.batch.tokens != 1).sum(1).max()) for p in batch]
        assert lengths == sorted(lengths)  # examples of like length are together
    for sums, *gradients in found[1:]:
        assert sums == pytest.approx(found[0][0], rel=1e-5)
        for gradient, wanted in zip(gradients, found[0][1:]):
            close(gradient, wanted, atol=1e-5)
    assert sums["loss"] == pytest.approx(sums["text"] + 5.0 * sums["image"], rel=1e-5)


def test_a_step_has_its_own_examples_and_begins_a_dataset_again_in_another_order():
    class Ten:
        def __len__(self):
            return 10

        def example(self, index):
            return [Segment(str(index))]

    numbers = [int(s[0].content) for step in range(5) for s in stages.examples(Ten(), step, 4, 8)]
    assert (
        numbers[:10] == list(range(10)) != numbers[10:20] and sorted(numbers[10:20]) == numbers[:10]
    )


def test_prompts_that_guidance_subtracts_are_trained_on(orthus_start):
    """A dropped prompt leaves the unconditional sentence, or the images without the text."""
    rng, edit = random.Random(0), Tasks().example(2)
    found = {
        tuple(s.content if not s.is_image else "image" for s in stages.drop_prompt(edit, "e", rng))
        for _ in range(30)
    }
    assert found == {("e", "image"), ("image", "image")}
    caption = Tasks().example(0)
    assert stages.drop_prompt(caption, "e", rng)[0].content == "e"
    lengths = {}
    for dropout in (0.0, 1.0):
        stage = posttrain(orthus_start, guidance_dropout=dropout)
        lengths[dropout] = [len(s.tokens) for s in stage.choose(Tasks(), 0)]
    assert len(set(lengths[0.0])) > len(set(lengths[1.0])) > 1  # answers keep their prompts


def test_base_learns_output_images_alone(start):
    stage = stages.BaseStage(BaseSettings(**COMMON), Tasks(), start, False)
    (part,) = stage.batch(Tasks(), 0)
    assert len(part.batch.tokens) == 4 and set(part.batch.labels.unique().tolist()) == {-100, 263}
    terms = stage.losses(part, 0, seeded(0))
    assert (
        terms["text"] == 0
        and terms["loss"] == terms["image"] * stage.model.config.image_loss_weight
    )


def test_examples_longer_than_the_context_are_left_out(orthus_start, capsys):
    class Long(Tasks):
        def example(self, index):
            return (
                [Segment("a b " * 400), *Tasks().example(index)]
                if index % 2
                else Tasks().example(index)
            )

    stage = posttrain(orthus_start)
    stages.warn.cache_clear()
    assert len(stage.choose(Long(), 0)) == 3 and "left out" in "".join(capsys.readouterr())


# --- Losses --------------------------------------------------------------------------------------


def test_only_output_images_are_read_with_noise_and_all_are_predicted_clean(orthus_start):
    stage = posttrain(orthus_start, input_noise=0.5, guidance_dropout=0.0)
    (part,) = stage.batch(Tasks(), 0)
    seen, loss = {}, stage.model.loss

    def spy(tokens, read, labels, generator, targets):
        seen.update(read=read, targets=targets, labels=labels[tokens == 263])
        return loss(tokens, read, labels, generator, targets)

    stage.model.loss = spy
    stage.losses(part, 0, seeded(0))
    clean = stage.vae.encode(part.batch.images).flatten(0, 1)
    close(seen["targets"], clean)
    moved, is_output = seen["read"] - clean, seen["labels"] == 263
    assert 0 < is_output.sum() < len(is_output) and moved[~is_output].abs().max() < 1e-4
    assert moved[is_output].std().item() == pytest.approx(0.5 * clean.std().item(), rel=0.1)


def test_the_loss_by_noise_level_is_the_heads_at_those_levels(orthus_start):
    stage = posttrain(orthus_start, guidance_dropout=0.0)
    (part,) = stage.batch(Tasks(), 0)
    levels, head = {}, stage.model.image_head
    loss = type(head).loss

    def spy(self, hidden, latents, t=None, noise=None, generator=None):
        levels[int(t.min()) // 250 * 250] = (int(t.min()), int(t.max()), len(latents))
        return loss(self, hidden, latents, t, noise, generator)

    type(head).loss = spy
    try:
        terms = stage.image_loss_by_level(part, seeded(0))
    finally:
        type(head).loss = loss
    assert terms.keys() == {"image_t0", "image_t250", "image_t500", "image_t750"}
    outputs = int((part.batch.labels == 263).sum())
    assert all(low <= a and b < low + 250 and n == outputs for low, (a, b, n) in levels.items())


def test_reconstruction_weighs_small_detail_and_edges():
    settings = stages.AutoencoderSettings(detail_weight=3.0, edge_weight=2.0)
    target, detail = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    image = target.clone()
    image[..., 0, 0] = 1.0
    plain = 1 / 16 + 0.1 / 16
    edges = 2 * (1 / 12)  # one step along each axis, of 12 each
    assert stages.reconstruction_loss(image, target, detail, settings).item() == pytest.approx(
        plain + 2 * edges
    )
    detail[..., 0, 0] = 1.0
    loss = stages.reconstruction_loss(image, target, detail, settings).item()
    assert loss == pytest.approx(plain + 2 * edges + 3.0)


def test_anisotropy_is_zero_for_latents_of_like_variance_alone():
    z = randn(4, 5000, 3)
    assert stages.anisotropy(z) < 0.01 < stages.anisotropy(z * torch.tensor([1.0, 1.0, 3.0]))
    assert stages.anisotropy(7 * z) == pytest.approx(stages.anisotropy(z).item(), abs=1e-4)


def test_latent_noise_is_of_the_latents_deviation():
    z = 3 * randn(2, 500, 16)
    noise = stages.add_latent_noise(z, 0.5, seeded(0)) - z
    assert noise.std().item() == pytest.approx(1.5, rel=0.02)


def test_the_autoencoder_trains_its_codes_and_its_continuous_part():
    """The gradient goes through the codes to the encoder; before quantise_from there are none."""
    settings = stages.VAESettings(**COMMON | dict(quantise_from=5, quantised_share=0.5))
    stage = stages.VAEStage(settings, Tasks(), None, False)
    (part,) = stage.batch(Tasks(), 0)
    assert "quantised" not in stage.losses(part, 4, seeded(0))
    terms = stage.losses(part, 5, seeded(0))
    assert terms.keys() >= {"quantised", "commitment", "continuous", "anisotropy"}
    terms["quantised"].backward(retain_graph=True)
    assert stage.model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert stage.model.quantize.embedding.weight.grad is None
    terms["loss"].backward()
    assert stage.model.quantize.embedding.weight.grad.abs().sum() > 0


def test_dead_codes_are_revived_in_the_average_too_and_forget_their_moments():
    settings = stages.VAESettings(**COMMON | dict(quantise_from=0, revive_every=1, steps=100))
    stage = stages.VAEStage(settings, Tasks(), None, False)
    codebook = stage.model.quantize.embedding.weight
    codebook.data[:200] = 1e3  # nearest to nothing
    before, average = (
        codebook.detach().clone(),
        {"quantize.embedding.weight": torch.zeros_like(codebook)},
    )
    state = {codebook: {"exp_avg": torch.ones_like(codebook), "step": torch.tensor(3.0)}}
    stage.after_step(7, Tasks(), state, average)
    moved = (codebook != before).any(1)
    assert moved[:200].all() and codebook[:200].abs().max() < 100
    revived = average["quantize.embedding.weight"]
    assert torch.equal(revived[moved], codebook[moved]) and (revived[~moved] == 0).all()
    assert (state[codebook]["exp_avg"][moved] == 0).all() and state[codebook]["step"] == 3
    stage.after_step(70, Tasks(), state, average)  # past revive_until
    assert not (codebook != before).any(1)[200:].all()


def test_an_autoencoder_that_goes_on_keeps_its_latents(start):
    stage = stages.VAEStage(stages.VAESettings(**COMMON), Tasks(), start, False)
    (part,) = stage.batch(Tasks(), 0)
    assert stage.losses(part, 0, seeded(0))["moved"] == 0
    with torch.no_grad():
        stage.model.quant_conv.weight.mul_(1.1)
    assert stage.losses(part, 0, seeded(0))["moved"] > 0
    assert stage.others.keys() == {"model"} and stage.tokenizer  # the model goes along


# --- Low rank ------------------------------------------------------------------------------------


def test_low_rank_begins_at_the_model_and_merges_into_an_ordinary_one(orthus_start):
    plain, low = posttrain(orthus_start), posttrain(orthus_start, lora_rank=4, lora_scale=3.0)
    tokens, none = torch.randint(264, 300, (2, 9), generator=seeded(0)), torch.zeros(0, 16)
    with torch.no_grad():
        close(low.model(tokens, none), plain.model(tokens, none), atol=0)
    names = {n for n, p in low.model.named_parameters() if p.requires_grad}
    inside = {n for n in names if n.startswith("layers.")}
    assert inside and all(n.endswith((".A.weight", ".B.weight")) for n in inside)
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= names
    with torch.no_grad():
        for module in low.model.modules():
            if isinstance(module, stages.LowRank):
                module.B.weight.copy_(0.1 * randn(*module.B.weight.shape))
        merged = stages.merged(low.model, low.model.state_dict())
        assert merged.keys() == plain.model.state_dict().keys()
        plain.model.load_state_dict(merged)
        close(low.model(tokens, none), plain.model(tokens, none), atol=1e-4)
        assert not torch.equal(
            merged["layers.0.mlp.up_proj.weight"],
            orthus_start.tensors("model")["layers.0.mlp.up_proj.weight"],
        )


def test_frozen_matrices_stay_in_bf16_and_what_learns_is_in_fp32(orthus_start, tmp_path):
    tensors = {n: t.bfloat16() for n, t in orthus_start.tensors("model").items()}
    vae, tokenizer = orthus_start.tensors("vae"), orthus_start.tokenizer
    checkpoint.write(tmp_path, orthus_start.config, tensors, vae, tokenizer)
    half = checkpoint.open_checkpoint(tmp_path)
    model = posttrain(half, lora_rank=2, dtype="bfloat16").model
    kinds = {p.requires_grad: set() for p in model.parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear | stages.LowRank):
            kinds[module.weight.requires_grad].add(module.weight.dtype)
    assert kinds[False] == {torch.bfloat16} and kinds[True] == {torch.float32}
