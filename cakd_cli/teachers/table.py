"""The answers of a memory that a run has met, held on the device: recalled by one kernel, without a wait.

A row comes here when it is first met, and is then checked against its checksum. To read all of them at the start would
cost as much a row, in vain for those that the run never meets, and miss what other processes write meanwhile.

Shape suffixes: N views asked for, K those of them that were not here, D numbers in all answers to a view.
"""

import numpy as np
import torch
from torch import Tensor

from cakd_cli.data.base import to_device
from cakd_cli.teachers.memory import TeacherMemory


class AnswerTable:
    """One row a view on the device, in the precision of the memory; which of them are known stands on the host.

    Args:
        memory: Where the rows come from.
        device: Where they are held; all of them have their room from the beginning.
    """

    def __init__(self, memory: TeacherMemory, device: torch.device) -> None:
        identity = memory.identity
        self._memory = memory
        self._rows = torch.empty(identity.rows, identity.width, dtype=identity.dtype, device=device)
        self._known = torch.zeros(identity.rows, dtype=torch.bool)

    def recall(self, views_N: Tensor) -> tuple[Tensor, Tensor]:
        """Look up answers here and, where they have not been met before, in the memory.

        Args:
            views_N: Names of views, int64 on the CPU.

        Returns:
            Answers (views, width) in float32 on the device, anything where unknown, and which are known, bool (views,)
            on the CPU.

        Raises:
            InputError: If the memory's files have been cut since they were opened.
        """
        absent_K = views_N[~self._known[views_N]]
        if len(absent_K):
            rows_KD, known_K = self._memory.recall(absent_K)
            found = absent_K[known_K]
            self.put(found, upload(rows_KD[known_K], self._rows.device))
            self._known[found] = True
        rows_ND = self._rows.index_select(0, upload(views_N, self._rows.device))
        return rows_ND.float(), self._known[views_N]

    def put(self, views_N: Tensor, rows_ND: Tensor) -> None:
        """Lay answers into their rows; they are not known yet, for only the device can tell whether they are finite.

        Args:
            views_N: Names of views, int64 on the CPU.
            rows_ND: Answers on the device.
        """
        self._rows.index_copy_(0, upload(views_N, self._rows.device), rows_ND.to(self._rows.dtype))

    def confirm(self, views_N: Tensor, rows_ND: Tensor) -> None:
        """Make rows known that were put before; as in the memory, those that are not finite stay unknown.

        Args:
            views_N: Names of views, int64 on the CPU.
            rows_ND: What was put, in the precision of the memory, on the CPU.
        """
        self._known[views_N[np.isfinite(rows_ND.numpy()).all(1)]] = True


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from the host; a CUDA device is not waited for."""
    return to_device(tensor.pin_memory() if device.type == "cuda" else tensor, device)
