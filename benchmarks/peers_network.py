"""The U-Net of another library in the same configuration: diffusers' ``UNet2DModel``. Optional.

    pip install diffusers

It has the same widths, blocks, groups of 4 channels and single head; its resolutions change by a convolution (down) and
by repetition and a convolution (up), and it attends after every block on the way up too.
"""

from torch import nn


def diffusers(
    shape: tuple[int, int, int],
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[bool, ...],
) -> nn.Module:
    """``model(x, label).sample`` of the shape of ``x``; raises ImportError where the library is absent."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=blocks,
        block_out_channels=tuple(channels * m for m in multipliers),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attention),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attention)),
        norm_num_groups=min(32, channels // 4),
        attention_head_dim=None,
    )
