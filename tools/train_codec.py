"""Train the small AutoencoderKL that ships as the codec of the emoji pictures.

    python tools/train_codec.py --out runs/codec

The weights are saved as half precision safetensors with a diffusers `config.json`, whose
`scaling_factor` and `shift_factor` give the training latents mean 0 and standard deviation 1:
`(z - shift) * scale`, as arXiv:2112.10752 section D.1 does with the scale alone. Figures are taken
from the saved file, not from the model in memory.
"""

import argparse
import io
import json
import math
import platform
import time
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

STYLES = ("3d", "flat", "noto")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="difftrain/data/emoji64.zip", help="zip with metadata.jsonl")
    p.add_argument("--out", required=True, type=Path, help="folder for weights and figures")
    p.add_argument("--channels", type=int, nargs="+", default=[64, 64, 72, 80])
    p.add_argument("--latent", type=int, default=4, help="latent channels")
    p.add_argument("--layers", type=int, default=1, help="residual blocks a level")
    p.add_argument("--groups", type=int, default=8, help="groups of each normalisation")
    p.add_argument("--kl", type=float, default=2e-3, help="weight of the KL of one latent value")
    p.add_argument("--edge", type=float, default=0.5, help="weight of the gradient loss")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=13_000)
    p.add_argument("--minutes", type=float, default=0, help="end after this time; 0: no limit")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p.parse_args()


# ---------------------------------------------------------------- pictures


def pictures(path, split):
    """Pictures [N, 3, 64, 64] in [-1, 1] and the style of each, for one split of the zip."""
    with zipfile.ZipFile(path) as z:
        rows = [json.loads(line) for line in z.read("metadata.jsonl").splitlines()]
        rows = [row for row in rows if row["split"] == split]
        images = [np.asarray(Image.open(io.BytesIO(z.read(r["file_name"])))) for r in rows]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, [row["style"] for row in rows]


def augment(x, rng):
    """Pictures [B, 3, H, W], flipped and, half of them, turned, scaled and shifted on white.

    A third have their colour channels permuted, so that shape and colour are coded apart.
    """
    b = len(x)

    def draw(*shape):
        return torch.rand(*shape, generator=rng, device=x.device)

    moved = (draw(b) < 0.5).float()
    angle = moved * (draw(b) - 0.5) * 0.5
    scale = 1 + moved * (draw(b) - 0.5) * 0.3
    flip = torch.where(draw(b) < 0.5, -1.0, 1.0)
    shift = moved[:, None] * (draw(b, 2) - 0.5) * 0.25
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), x.shape, align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # zeros outside, so white
    order = torch.where(draw(b, 1) < 1 / 3, draw(b, 3), torch.arange(3.0, device=x.device))
    return x.gather(1, order.argsort(1)[:, :, None, None].expand_as(x))


# ---------------------------------------------------------------- model and loss


def network(args):
    levels = len(args.channels)
    return AutoencoderKL(
        block_out_channels=args.channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=args.layers,
        latent_channels=args.latent,
        norm_num_groups=args.groups,
        sample_size=64,
        force_upcast=False,
    )


def moments(model, x):
    """Mean and log variance [B, C, h, w] of the latents of pictures `x`, in fp32."""
    mean, logvar = model.quant_conv(model.encoder(x)).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def restore(model, z):
    return model.decoder(model.post_quant_conv(z)).float()


def slopes(x):
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def objective(model, x, noise, args):
    """Loss, and the mean KL of one latent value: l1 + 2 mse + edge * l1 of slopes + kl * KL."""
    mean, logvar = moments(model, x)
    y = restore(model, mean + torch.exp(0.5 * logvar) * noise)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    edge = sum((a - b).abs().mean() for a, b in zip(slopes(y), slopes(x), strict=True))
    fit = (y - x).abs().mean() + 2 * ((y - x) ** 2).mean()
    return fit + args.edge * edge + args.kl * kl, kl


def train(model, images, args):
    """Steps taken; `model` holds the averaged weights afterwards."""
    weights = list(model.parameters())
    average = [w.detach().clone() for w in weights]
    fused = args.device == "cuda"
    optimizer = torch.optim.AdamW(weights, args.lr, (0.9, 0.99), weight_decay=1e-2, fused=fused)
    compiled = torch.compile(objective, disable=args.device == "cpu")
    batches = draw_batches(images, args)
    began, step, bar = time.monotonic(), 0, tqdm(total=args.steps, mininterval=10)
    while (done := progress(step, began, args)) < 1:
        optimizer.param_groups[0]["lr"] = args.lr * min(1, 50 * done) * cosine(done)
        with torch.autocast(args.device, torch.bfloat16):
            loss, kl = compiled(model, *next(batches), args)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - ema_rate(step, args))
        step += 1
        bar.update()
        if step % 1000 == 0:
            bar.write(f"step {step} loss {loss.item():.4f} kl {kl.item():.3f}")
    for w, a in zip(weights, average, strict=True):
        w.data.copy_(a)
    return step


def draw_batches(images, args):
    """Pairs of augmented pictures [B, 3, H, W] and latent noise [B, C, h, w], without end."""
    rng = torch.Generator(args.device).manual_seed(args.seed)
    side = images.shape[-1] // 2 ** (len(args.channels) - 1)
    shape = (args.batch, args.latent, side, side)
    while True:
        rows = torch.randint(len(images), (args.batch,), generator=rng, device=args.device)
        x = augment(images[rows], rng).contiguous(memory_format=torch.channels_last)
        yield x, torch.randn(shape, generator=rng, device=args.device)


def progress(step, began, args):
    """Fraction of the run that is done, by steps or by time, whichever is further."""
    spent = (time.monotonic() - began) / 60
    return max(step / args.steps, spent / args.minutes if args.minutes else 0)


def cosine(done):
    return 0.5 * (1 + math.cos(math.pi * done))


def ema_rate(step, args):
    """Decay of the average: it forgets the start of a run quickly."""
    return min(args.ema, (1 + step) / (10 + step))


# ---------------------------------------------------------------- saving and measuring


@torch.no_grad()
def latents(model, x):
    return torch.cat([moments(model, part)[0] for part in x.split(256)])


def save(model, images, folder):
    """The scale and shift are measured on the half precision weights that are written."""
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(w.half())
    z = latents(model, images)
    model.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_config(folder)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def psnr(y, x):
    """Peak signal to noise ratio [N] in dB of pictures in [-1, 1], one for each picture."""
    error = ((y.clamp(-1, 1) - x) ** 2).mean(dim=(1, 2, 3)) / 4
    return -10 * torch.log10(error.clamp_min(1e-10))


def by_style(values, styles):
    rows = {
        s: [v for v, style in zip(values.tolist(), styles, strict=True) if style == s]
        for s in STYLES
    }
    return {s: round(sum(v) / len(v), 2) for s, v in rows.items()}


@torch.no_grad()
def figures(model, train_set, test_set, styles):
    """Figures of a saved codec: PSNR by style, with a tenth of noise too, and latent statistics."""
    c = model.config
    z = (latents(model, train_set) - c.shift_factor) * c.scaling_factor
    held = latents(model, test_set)
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(0)).to(held)
    return {
        "psnr": by_style(psnr(restore(model, held), test_set), styles),
        "psnr_noise_0.1": by_style(
            psnr(restore(model, held + 0.1 * noise / c.scaling_factor), test_set), styles
        ),
        "psnr_train": round(mean_psnr(model, train_set[:512]), 2),
        "latent_std": round(z.std().item(), 4),
        "latent_mean": round(z.mean().item(), 4),
        "channel_std": [round(v, 3) for v in z.std(dim=(0, 2, 3)).tolist()],
        "channel_mean": [round(v, 3) for v in z.mean(dim=(0, 2, 3)).tolist()],
        "latent_absmax": round(z.abs().max().item(), 2),
        "neighbour_correlation": round((z[..., 1:] * z[..., :-1]).mean().item(), 3),
    }


def mean_psnr(model, x):
    return psnr(restore(model, latents(model, x)), x).mean().item()


@torch.no_grad()
def strip(model, x, styles, path, columns=16):
    """Write held-out originals above their reconstructions, one pair of rows for each style."""
    rows = []
    for style in STYLES:
        chosen = [i for i, s in enumerate(styles) if s == style][:columns]
        original = x[chosen]
        rows += [original, restore(model, latents(model, original)).clamp(-1, 1)]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path, optimize=True)


def tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def origin(args):
    """What a reader needs to run it again."""
    return {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    train_set, _ = pictures(args.data, "train")
    test_set, styles = pictures(args.data, "test")
    train_set, test_set = train_set.to(args.device), test_set.to(args.device)
    model = network(args).to(args.device, memory_format=torch.channels_last)
    tf32(True)
    began = time.monotonic()
    steps = train(model, train_set, args)
    seconds = round(time.monotonic() - began)
    tf32(False)
    save(model, train_set, args.out)
    saved = AutoencoderKL.from_pretrained(args.out, use_safetensors=True).to(args.device).eval()
    report = origin(args) | {
        "steps": steps,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "bytes": (args.out / WEIGHTS).stat().st_size,
    }
    report |= figures(saved, train_set, test_set, styles)
    strip(saved, test_set, styles, args.out / "strip.png")
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
