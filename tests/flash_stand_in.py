"""Stands for PyTorch's flash kernel where there is no CUDA device."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class FlashStandIn:
    """Computes what the kernel's autograd function does, on any device and under a compiler."""

    @staticmethod
    def apply(
        query_THD: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        query_size: Tensor,
        key_size: Tensor,
        scale: float,
    ) -> Tensor:
        """Return [T, H, D]; NaN where sequences are empty, or longer than the row says."""
        place_T, place_S = (torch.arange(len(values)) for values in (query_THD, key_SGD))
        of_T, of_S = (
            torch.searchsorted(ends, place, right=True, out_int32=True) - 1
            for ends, place in ((query_ends, place_T), (key_ends, place_S))
        )
        # The last query of a sequence sees all of its keys, the one before all but one.
        behind_T, behind_S = query_ends[of_T + 1] - place_T, key_ends[of_S + 1] - place_S
        mask_TS = (of_T[:, None] == of_S) & (behind_T[:, None] <= behind_S)
        out_1HTD = scaled_dot_product_attention(
            *(values.transpose(0, 1)[None] for values in (query_THD, key_SGD, value_SGD)),
            attn_mask=mask_TS,
            scale=scale,
            enable_gqa=query_THD.shape[1] != key_SGD.shape[1],
        )
        queries, keys = query_ends.diff(), key_ends.diff()
        fits = (queries.max() <= query_size.shape[0]) & (keys.max() <= key_size.shape[0])
        return torch.where(fits & (queries.min() > 0), out_1HTD[0].transpose(0, 1), torch.nan)
