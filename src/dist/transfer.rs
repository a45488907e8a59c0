//! Rows of tensors on their way between ranks.

use super::communicator::{Communicator, Exchange, Incoming, Outgoing, Transfer, TransferMut, incoming, outgoing};
use super::digest::{Digest, Tag};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::Result;
use crate::host_vec;
use crate::mask::meta::VarlenMeta;
use crate::primitives::{pack, pack_into, scatter_to_padded_into};
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// What the steps of one call share.
#[derive(Debug)]
pub(super) struct Steps<'a> {
    pub communicator: &'a mut dyn Communicator,
    pub device: &'a Device,
    /// Tells the request apart.
    pub tag: Tag,
}

impl Steps<'_> {
    /// Sends whole tensors to ranks and receives others; `number` tells exchanges of one name apart.
    pub(super) fn exchange(
        &mut self,
        (operation, number): (&'static str, usize),
        sends: Vec<(usize, &Tensor)>,
        receives: Vec<(usize, &mut Tensor)>,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let tag = Digest::new().bytes(&self.tag).bytes(operation.as_bytes()).sizes([number]).tag();
        if self.communicator.moves_memory_of(self.device) {
            let send = |(to, tensor): (usize, _)| Outgoing { to, from: whole(tensor) };
            let receive = |(from, tensor): (usize, _)| Incoming { from, to: whole_mut(tensor) };
            let sends = sends.into_iter().map(send).collect();
            let receives = receives.into_iter().map(receive).collect();
            return self.communicator.exchange(Exchange { operation, tag, sends, receives }, meanwhile);
        }
        let backend = self.device.backend()?;
        let mut staged = Vec::with_capacity(sends.len());
        for (to, tensor) in sends {
            let mut bytes = host_vec::zeroed(byte_len(tensor))?;
            backend.download(tensor.view().input().memory, &mut bytes)?;
            staged.push((to, bytes));
        }
        let mut arrived = Vec::with_capacity(receives.len());
        for (from, tensor) in &receives {
            arrived.push((*from, host_vec::zeroed(byte_len(tensor))?));
        }
        let sends = staged.iter().map(|(to, bytes)| Outgoing { to: *to, from: Transfer::Host(bytes) }).collect();
        let room = arrived.iter_mut().map(|(from, bytes)| Incoming { from: *from, to: TransferMut::Host(bytes) });
        let exchange = Exchange { operation, tag, sends, receives: room.collect() };
        self.communicator.exchange(exchange, meanwhile)?;
        for ((_, tensor), (_, bytes)) in receives.into_iter().zip(&arrived) {
            backend.upload(tensor.view_mut().output().memory, bytes)?;
        }
        Ok(())
    }
}

fn byte_len(tensor: &Tensor) -> usize {
    tensor.view().layout().numel() * tensor.dtype().size()
}

fn whole(tensor: &Tensor) -> Transfer<'_> {
    outgoing(tensor.view().input().memory, 0..byte_len(tensor) as u64)
}

fn whole_mut(tensor: &mut Tensor) -> TransferMut<'_> {
    let bytes = 0..byte_len(tensor) as u64;
    incoming(tensor.view_mut().output().memory, bytes)
}

/// The valid rows of several `[B, S, h, D]` tensors side by side: `[total_valid, Σ h, D]`, one message. None without a valid row.
pub(super) fn pack_beside(device: &Device, tensors: &[TensorView<'_>], meta: &VarlenMeta) -> Result<Option<Tensor>> {
    let heads = tensors.iter().map(|tensor| tensor.shape()[2]).sum();
    let Some(mut packed) = room(device, meta, [heads, tensors[0].shape()[3]], tensors[0].dtype())? else {
        return Ok(None);
    };
    let mut first = 0;
    for tensor in tensors {
        let heads = first..first + tensor.shape()[2];
        first = heads.end;
        pack_into(device, *tensor, meta, packed.view_mut().slice(1, heads)?)?;
    }
    Ok(Some(packed))
}

/// Room for the valid rows of some tokens. None without a valid row.
pub(super) fn room(
    device: &Device,
    meta: &VarlenMeta,
    [heads, head_dim]: [usize; 2],
    dtype: DType,
) -> Result<Option<Tensor>> {
    match meta.total_valid() {
        0 => Ok(None),
        rows => Tensor::uninit(device, dtype, &[rows, heads, head_dim]).map(Some),
    }
}

/// Copies valid rows of `[B, S, h, D]`; what the others of `to` hold afterwards is not specified.
pub(super) fn copy_rows(device: &Device, from: TensorView<'_>, meta: &VarlenMeta, to: TensorViewMut<'_>) -> Result<()> {
    if meta.is_empty() {
        return Ok(());
    }
    scatter_to_padded_into(device, &pack(device, from, meta)?, meta, to)
}
