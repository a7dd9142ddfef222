"""Makes tests/fixtures: tiny random models and schedules, with what peer libraries compute on them.

    chameleon_7b.safetensors   transformers' Chameleon: norms first, one key/value head per head
    chameleon_30b.safetensors  the same with norms last (swin_norm), grouped key/value heads, and
                               q/k norms in four groups, one for each shard of the 30B model
    vqvae.safetensors          transformers' Chameleon VQ-VAE: encoder, quantiser, 1x1 convolutions
    diffusion.safetensors      diffusers' DDIM: noise schedules, timesteps, whole trajectories
    golden.safetensors         the released Orthus on a tiny random model, cut from the recordings
                               in the folder $ORTHUS_GOLDEN: transformer, head, soft embedding

The committed files were made with torch 2.13.0, transformers 5.23.0, diffusers 0.42.1, numpy 2.4.6
and safetensors 0.8.0. The peers, transformers and diffusers, are not requirements of this project:
the tests read the files alone. To make the files again, with the same numbers:

    pip install transformers==5.23.0 diffusers==0.42.1 && python tests/make_fixtures.py
    ORTHUS_GOLDEN=FOLDER python tests/make_fixtures.py golden      the last file alone; no peers

Weights stand under the Hub's parameter names, which hold a dot; what the models compute stands
beside them under names without one. Sizes stand under the Hub's config names, as JSON in the
metadata entry "config". Tensors are fp32 or int64, but for the bytes of a tokenizer. The files are
at most 3 MB together.
"""

import gzip
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN_ALONE = sys.argv[1:] == ["golden"]
if not GOLDEN_ALONE:
    from diffusers import DDIMScheduler
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAE
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

FIXTURES = Path(__file__).parent / "fixtures"

# --- Sizes --------------------------------------------------------------------------------------

# The vocabulary is laid out like Chameleon's: <s> <pad> </s> <unk>, image codes, specials, text.
BOS, PAD, FIRST_CODE, CODES = 0, 1, 4, 32
EOI, BOI, SEP, IMAGE = range(FIRST_CODE + CODES, FIRST_CODE + CODES + 4)
FIRST_TEXT, VOCABULARY = IMAGE + 1, 128

VQ = dict(
    base_channels=32,  # GroupNorm has 32 groups
    channel_multiplier=[1, 1, 2, 1],  # one level keeps its width, one widens, one narrows
    num_res_blocks=1,
    in_channels=3,
    resolution=32,
    latent_channels=16,
    embed_dim=16,
    num_embeddings=CODES,
    double_latent=False,
    dropout=0.0,
    attn_resolutions=None,
    attn_type="vanilla",
)
CHAMELEON = dict(
    model_type="chameleon",
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    swin_norm=False,
    model_parallel_size=1,
)
CHAMELEON_7B = CHAMELEON
CHAMELEON_30B = CHAMELEON | dict(
    num_attention_heads=8, num_key_value_heads=4, swin_norm=True, model_parallel_size=4
)


def vocabulary_map() -> dict[str, int]:
    """Names to ids. Image codes are named like Chameleon's: A..J stand for the digits 0..9."""
    names = {"<s>": BOS, "<pad>": PAD, "</s>": 2, "<unk>": 3}
    for code in range(CODES):
        letters = "".join(chr(ord("A") + int(digit)) for digit in str(code))
        names[f"IMGIMG{letters}Z"] = FIRST_CODE + code
    return names | {"<eoss>": EOI, "<racm3:break>": BOI, "<reserved08706>": SEP, "<image>": IMAGE}


# --- Random weights -----------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: torch.nn.Module, groups: int, generator: torch.Generator) -> None:
    """Fill every parameter such that each one shows in the outputs: no norm is the identity, no
    bias is zero, and the inputs of the norms are small enough for a wrong eps to be seen."""
    for name, parameter in model.named_parameters():
        shape, is_head_norm = parameter.shape, "q_norm" in name or "k_norm" in name
        if is_head_norm:  # [heads, head width]; the heads of a group share their rows
            shape = (groups, parameter.shape[1])
        if name.endswith("bias"):
            value = 0.3 * torch.randn(shape, generator=generator)
        elif parameter.ndim == 1 or is_head_norm:
            value = 0.5 + torch.rand(shape, generator=generator)
        else:
            fan_in = parameter[0].numel()
            small = any(part in name for part in ("embed_tokens", "q_proj", "k_proj"))
            scale = 0.02 if small else 1.0 if "quantize" in name else fan_in**-0.5
            value = scale * torch.randn(shape, generator=generator)
        if is_head_norm:
            value = value.repeat_interleave(parameter.shape[0] // groups, dim=0)
        parameter.copy_(value)


# --- Chameleon: transformer and LM head ---------------------------------------------------------


def prompts(generator: torch.Generator) -> torch.Tensor:
    """(4, 16): two of text alone, two with an image, whose codes are plain tokens from 4 on."""
    tokens = torch.randint(FIRST_TEXT, VOCABULARY, (4, 16), generator=generator)
    codes = torch.randint(FIRST_CODE, FIRST_CODE + CODES, (2, 8), generator=generator)
    tokens[:, 0] = BOS
    tokens[1, 9] = SEP
    for row, start in ((2, 1), (3, 5)):  # the image comes first, the image comes after text
        tokens[row, start], tokens[row, start + 9] = BOI, EOI
        tokens[row, start + 1 : start + 9] = codes[row - 2]
    return tokens


def pad_left(tokens: torch.Tensor) -> torch.Tensor:
    """(3, 16): three of the prompts, cut to 16, 13 and 9 tokens, with pads on their left."""
    padded = torch.full((3, tokens.shape[1]), PAD)
    for row, (prompt, length) in enumerate(((2, 16), (3, 13), (1, 9))):
        padded[row, -length:] = tokens[prompt, :length]
    return padded


def hidden_and_logits(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D) after the final norm, and (B, T, V); zeros at pads.

    The logits are the LM head's. The model's own forward then overwrites those of the image codes
    with the lowest number, so they are taken before that, and compared with it elsewhere.
    """
    visible = tokens != PAD
    inputs = dict(
        input_ids=tokens,
        attention_mask=visible.long(),
        position_ids=(visible.cumsum(1) - 1).clamp(min=0),  # counted from the first real token
        use_cache=False,
    )
    hidden = model.model(**inputs).last_hidden_state
    logits = model.lm_head(hidden)
    masked = model(**inputs).logits
    codes = slice(FIRST_CODE, FIRST_CODE + CODES)
    assert (masked[..., codes] == torch.finfo(torch.float32).min).all()
    masked[..., codes] = logits[..., codes]
    assert torch.equal(masked, logits)
    return hidden * visible[..., None], logits * visible[..., None]


def make_chameleon(name: str, sizes: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hub = sizes | dict(vocabulary_map=vocabulary_map(), vq_config=VQ)  # as in the Hub's config.json
    peer = {k: v for k, v in hub.items() if k not in ("model_type", "rope_theta")}
    peer["rope_parameters"] = dict(rope_type="default", rope_theta=hub["rope_theta"])
    config = ChameleonConfig(**peer, attn_implementation="eager")
    model = ChameleonForConditionalGeneration(config).eval()
    del model.model.vqmodel  # the autoencoder has its own file
    randomise(model, sizes["model_parallel_size"], generator)

    tokens = prompts(generator)
    padded_tokens = pad_left(tokens)
    hidden, logits = hidden_and_logits(model, tokens)
    padded_hidden, padded_logits = hidden_and_logits(model, padded_tokens)
    for row, prompt in enumerate((2, 3, 1)):  # pads change nothing: causal, and relative positions
        length = int((padded_tokens[row] != PAD).sum())
        assert torch.allclose(padded_hidden[row, -length:], hidden[prompt, :length], atol=1e-5)

    recorded = dict(
        tokens=tokens,
        hidden=hidden,
        logits=logits,
        padded_tokens=padded_tokens,
        padded_hidden=padded_hidden,
        padded_logits=padded_logits,
    )
    # The parameter names inside this version of transformers are the Hub's: nothing to rename.
    write(name, model.state_dict() | recorded, hub)


# --- The autoencoder's encoder and quantiser ----------------------------------------------------


def make_vqvae(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**VQ)).eval()
    randomise(model, 1, generator)
    images = torch.rand(2, 3, VQ["resolution"], VQ["resolution"], generator=generator) * 2 - 1

    latents = model.quant_conv(model.encoder(images)).flatten(2).transpose(1, 2)  # (B, L, C)
    codes = model.encode(images).image_tokens.view(latents.shape[:2])  # (B, L)
    nearest = torch.cdist(latents, model.quantize.embedding.weight).topk(2, largest=False)
    assert torch.equal(nearest.indices[..., 0], codes)
    margin = nearest.values[..., 1] - nearest.values[..., 0]
    assert margin.min() > 1e-3, f"a code is nearly a tie ({margin.min():.1e}): take another seed"

    recorded = dict(images=images, latents=latents, codes=codes)
    write("vqvae", model.state_dict() | recorded, VQ)


# --- Diffusion: schedules, noising, DDIM --------------------------------------------------------

BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02)}
STEPS = (1, 2, 3, 5, 7, 10, 16, 30, 48, 50, 100, 333, 1000)


def scheduler(schedule: str, zero_snr: bool, prediction: str = "v_prediction") -> "DDIMScheduler":
    beta_start, beta_end = BETAS[schedule]
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule=schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        rescale_betas_zero_snr=zero_snr,
        prediction_type=prediction,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def network(x: torch.Tensor, t: int, weight: torch.Tensor) -> torch.Tensor:
    """Stands for the diffusion head: a test computes the same from the stored weight."""
    return torch.tanh(x @ weight + t / 1000)


def trajectory(ddim: "DDIMScheduler", steps: int, x, weight, own_gap: bool) -> torch.Tensor:
    """(steps + 1, 4, 8): the starting noise, then x after each DDIM step, eta 0.

    From t, the scheduler's step goes to t - 1000 // steps. Where steps does not divide 1000 that is
    not the next of its own timesteps, and the last step may end short of alpha_bar = 1. own_gap
    records that as it is; without it, every step is told the distance to the next timestep.
    """
    ddim.set_timesteps(steps)
    timesteps = ddim.timesteps.tolist()
    path = [x]
    for t, next_t in zip(timesteps, timesteps[1:] + [-1]):
        if not own_gap:
            ddim.num_inference_steps = 1
            ddim.register_to_config(num_train_timesteps=t - next_t)
        x = ddim.step(network(x, t, weight), t, x, eta=0.0).prev_sample
        path.append(x)
    return torch.stack(path)


def record_schedule(schedule: str, zero_snr: bool, inputs: dict) -> dict[str, torch.Tensor]:
    name = f"{schedule}.{'zero_snr' if zero_snr else 'plain'}"
    ddim = scheduler(schedule, zero_snr)
    noising = inputs["latents"], inputs["noise"], inputs["t"]
    recorded = {
        f"{name}.alphas_cumprod": ddim.alphas_cumprod,
        f"{name}.noisy": ddim.add_noise(*noising),
        f"{name}.velocity": ddim.get_velocity(*noising),
    }
    # epsilon cannot start from zero terminal SNR: it would divide by alpha_bar[999] = 0
    for prediction in ("v_prediction",) if zero_snr else ("v_prediction", "epsilon"):
        for steps in (10, 7):
            exact, own = (
                trajectory(
                    scheduler(schedule, zero_snr, prediction),
                    steps,
                    inputs["x"],
                    inputs["weight"],
                    own_gap,
                )
                for own_gap in (False, True)
            )
            recorded[f"{name}.{prediction}.{steps}"] = exact
            if 1000 % steps:
                recorded[f"{name}.{prediction}.{steps}.own_gap"] = own
            else:
                assert torch.equal(exact, own)
    return recorded


def make_diffusion(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([0, 1, 37, 250, 500, 750, 998, 999])
    inputs = dict(
        t=t,
        latents=torch.randn(len(t), 8, generator=generator),
        noise=torch.randn(len(t), 8, generator=generator),
        x=torch.randn(4, 8, generator=generator),
        weight=torch.randn(8, 8, generator=generator) / 8**0.5,
    )
    tensors = dict(inputs)
    for schedule in BETAS:
        for zero_snr in (True, False):
            tensors |= record_schedule(schedule, zero_snr, inputs)
    for steps in STEPS:
        ddim = scheduler("scaled_linear", True)
        ddim.set_timesteps(steps)
        tensors[f"timesteps.{steps}"] = ddim.timesteps
    write("diffusion", tensors, dict(num_train_timesteps=1000, betas=BETAS, steps=STEPS))


# --- Recordings of the released Orthus ----------------------------------------------------------
#
# The recordings come with a checkpoint of 32 MB, and its weights are random fp32: nothing packs
# them. What is kept is what the recorded inputs see of them; it gives the same numbers:
#
#     a linear layer of the head    is needed on the span of its recorded inputs alone: W Q, and Q.
#                                   The span is our head's, in fp64: a head that computes anything
#                                   else leaves it, and gets other numbers
#     the codebook                  only its distances to the recorded latents count: coordinates in
#                                   the latents' span, and the length of the rest as one more
#     embeddings, LM head           some columns and rows: those of the outputs that are kept
#
# The transformer is whole. Tolerances: 1e-4; soft embedding: 2e-3 of its fp32, 2e-5 of its
# fp64. With $ORTHUS_GOLDEN set, the tests run on the whole checkpoint besides.

HEAD_ROWS = slice(0, 2)  # of the recorded calls of the head
HEAD_STEPS = {"b2": 0, "b3": 6}  # of DDIM: recorded index, whose x before is known too
EMBEDDED = [0, 24]  # latents: a wide mixture of codes and a narrow one
COLUMNS = slice(0, 2)  # of their embeddings
LOGITS = slice(0, None, 50)  # of the recorded every 16th


def span(inputs: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (D, r): an orthonormal basis of what the rows span, in fp64."""
    _, sizes, rows = torch.linalg.svd(inputs.double(), full_matrices=False)
    return rows[sizes > 1e-10 * sizes[0]].T


def head_calls(recorded: dict) -> dict[str, tuple[torch.Tensor, ...]]:
    """Recorded calls of the head: its x (N, 256), t (N,) and hidden (N, 64)."""
    calls = {"head": tuple(recorded[name][HEAD_ROWS] for name in ("x", "t", "c"))}
    for rows, i in HEAD_STEPS.items():
        step = int(recorded["step_indices"][i])
        before = recorded[f"{rows}.x_after_step"][i - 1] if step else recorded[f"{rows}.noise"]
        z = recorded[f"{rows}.z"]
        calls[rows] = before.expand(len(z), -1), torch.full((len(z),), 999 - 10 * step), z
    return calls


def golden_head(recorded: dict, weights: dict) -> dict[str, torch.Tensor]:
    """The head as its recorded calls see it: of each linear layer W Q (.left) and Q^T (right.)."""
    sys.path.insert(0, str(FIXTURES.parent.parent))
    from orthus import DiffusionHead, OrthusConfig

    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_width=256)
    head, prefix = DiffusionHead(OrthusConfig(**sizes)), "mlp_head."
    head.load_state_dict({k.removeprefix(prefix): t for k, t in weights.items() if prefix in k})
    inputs, bases = {}, {}
    linear = {n: p for n, p in head.double().named_modules() if isinstance(p, torch.nn.Linear)}
    for name, part in linear.items():
        keep = lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
        part.register_forward_pre_hook(keep)
    calls, tensors = head_calls(recorded), {}
    for name, (x, t, hidden) in calls.items():
        head(x.double(), t, hidden.double())
        tensors |= {f"{name}.x": x, f"{name}.t": t, f"{name}.hidden": hidden}
    for name in ("out", "time_embed", "y", "block0_out"):
        tensors[f"head.{name}"] = recorded[name][HEAD_ROWS]
    for rows, i in HEAD_STEPS.items():
        tensors[f"{rows}.velocity"] = recorded[f"{rows}.v_at_step"][i]
        tensors[f"{rows}.x_after"] = recorded[f"{rows}.x_after_step"][i]
        tensors[f"{rows}.latents"] = recorded[f"{rows}.latents"][:1]
    for name, part in linear.items():
        basis = span(torch.cat(inputs[name]))
        bases["adaLN" if "adaLN" in name else name] = basis  # all of these have the same inputs
        tensors[f"mlp_head.{name}.weight.left"] = (part.weight @ basis).float()
    tensors |= {f"right.{name}": basis.T.float() for name, basis in bases.items()}
    return tensors | {k: t for k, t in weights.items() if prefix in k and t.ndim == 1}


def golden_embedding(recorded: dict, weights: dict) -> dict[str, torch.Tensor]:
    latents, codes = recorded["emb_latents"][EMBEDDED].double(), weights["model.codebook_in.weight"]
    basis = span(latents)
    inside = codes.double() @ basis
    rest = (codes.double().square().sum(1) - inside.square().sum(1)).sqrt()
    return {
        "emb.codebook": torch.cat([inside, rest[:, None]], 1).float(),
        "emb.latents": torch.nn.functional.pad(latents @ basis, (0, 1)).float(),
        "emb.rows": weights["model.embed_tokens.weight"][4 : 4 + len(codes), COLUMNS],
        "emb.out": recorded["emb_out"][EMBEDDED, COLUMNS],
        "emb.exact": recorded["emb_out_f64"][EMBEDDED, COLUMNS].float(),
        "emb.top1": recorded["emb_top1"][EMBEDDED],
        "emb.top1_p": recorded["emb_top1_p"][EMBEDDED],
        "emb.effective": recorded["emb_eff"][EMBEDDED],
    }


def make_golden(folder: Path) -> None:
    """One file of the recordings in the folder; config.json without its vocabulary, the names and
    shapes of all tensors, and tokenizer.json (gzip) come along."""
    recorded, weights = {}, {}
    for name in ("head", "ddim", "mixed"):
        recorded |= load_file(folder / f"{name}.safetensors")
    for shard in sorted((folder / "ckpt").glob("*.safetensors")):
        weights |= load_file(shard)
    tensors = golden_head(recorded, weights) | golden_embedding(recorded, weights)
    for rows in ("one", "two", "batch"):
        for name in ("input_ids", "inputs_embeds", "hidden_last"):
            tensors[f"{rows}.{name}"] = recorded[f"{rows}_{name}"]
        tensors[f"{rows}.logits"] = recorded[f"{rows}_logits_s16"][..., LOGITS]
    tensors |= {k: t for k, t in weights.items() if k.startswith(("model.layers", "model.norm"))}
    tensors["lm_head"] = weights["lm_head.weight"][::16][LOGITS]
    tensors["prompt"] = recorded["b1.input_ids"][0]
    packed = gzip.compress((folder / "ckpt" / "tokenizer.json").read_bytes(), 9, mtime=0)
    tensors["tokenizer"] = torch.tensor(list(packed), dtype=torch.uint8)
    config = json.loads((folder / "ckpt" / "config.json").read_text())
    del config["vocabulary_map"]
    processor = json.loads((folder / "ckpt" / "preprocessor_config.json").read_text())
    shapes = {name: list(t.shape) for name, t in weights.items()}
    write("golden", tensors, dict(config=config, processor=processor, shapes=shapes))


# --- Files --------------------------------------------------------------------------------------


def write(name: str, tensors: dict[str, torch.Tensor], config: dict) -> None:
    for key, tensor in tensors.items():
        assert tensor.isfinite().all(), f"{name}: {key} is not finite"
    path = FIXTURES / f"{name}.safetensors"
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    print(f"{path.name:28}{path.stat().st_size / 1024:8.0f} KiB {len(tensors):5} tensors")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)  # the order of summation, and so the last bits, stay the same
    FIXTURES.mkdir(exist_ok=True)
    if not GOLDEN_ALONE:
        make_chameleon("chameleon_7b", CHAMELEON_7B, seed=7)
        make_chameleon("chameleon_30b", CHAMELEON_30B, seed=30)
        make_vqvae(seed=3)
        make_diffusion(seed=2)
    if "ORTHUS_GOLDEN" in os.environ:
        make_golden(Path(os.environ["ORTHUS_GOLDEN"]))


if __name__ == "__main__":
    main()
