"""Where a change of a picture would be seen: on what is smooth, and not within what is busy already.

    contrast = local_contrast(images)                    # (B, 1, H, W), images (B, 3, H, W) in [0, 1]
    change_where_smooth(clean, adversarial)              # (B,), in levels of 255

Values are in [0, 1], and windows are in pixels, whatever a picture's size.
"""

import torch
import torch.nn.functional as F

WINDOW, HALO, SPREAD = 2.0, 9, 3.0  # standard deviation and sides in pixels, see `local_contrast`
SMOOTH_BELOW = 0.01  # of local contrast: what looks plain, as sky and walls do


def gaussian_kernel(sigma: float) -> torch.Tensor:
    """A Gaussian of a standard deviation in pixels, cut off at four of them: `(2 radius + 1,)`, sum 1."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    return (kernel / kernel.sum()).float()


def blurred(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Each channel of `(B, C, H, W)` by itself under `kernel`, rows and then columns; edges are mirrored."""
    planes, radius, kernel = images.flatten(0, 1)[:, None], len(kernel) // 2, kernel.to(images)
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), "reflect"), kernel.view(1, 1, 1, -1))
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), "reflect"), kernel.view(1, 1, -1, 1))
    return planes.view_as(images)


def luminance(images: torch.Tensor) -> torch.Tensor:
    """Of `(B, 3, H, W)` as in ITU-R BT.601, `(B, 1, H, W)`."""
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def local_contrast(images: torch.Tensor) -> torch.Tensor:
    """How busy the luminance of a picture is at each place: `(B, 3, H, W)` in [0, 1] to `(B, 1, H, W)`.

    The standard deviation in a Gaussian window; of that the least within HALO x HALO pixels, because what
    lies beside an edge is smooth although the window sees the edge; blurred, so that no border of it shows.
    """
    plane = luminance(images)
    # about the mean, since the difference of two large numbers would leave rounding alone
    centred = plane - plane.mean((2, 3), keepdim=True)
    window = gaussian_kernel(WINDOW)
    variance = blurred(centred.square(), window) - blurred(centred, window).square()
    deviation, half = variance.clamp(min=0).sqrt(), HALO // 2
    least = -F.max_pool2d(F.pad(-deviation, (half,) * 4, "replicate"), HALO, stride=1)
    return blurred(least, gaussian_kernel(SPREAD))


def change_where_smooth(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Root mean square change in levels of 255 over the places of `(B, 3, H, W)` whose local contrast in the
    clean picture is below SMOOTH_BELOW; `(B,)`, NaN for a picture without such a place.
    """
    smooth = (local_contrast(clean) < SMOOTH_BELOW).to(clean)
    squares = (255 * (other - clean)).square().mean(1, keepdim=True)
    return ((squares * smooth).sum((1, 2, 3)) / smooth.sum((1, 2, 3))).sqrt()
