//! Rows of tensors on their way between ranks.

use super::communicator::{Communicator, Exchange, Incoming, Outgoing, Transfer, TransferMut, incoming, outgoing};
use super::digest::{Digest, Tag};
use super::kept::{Lent, Room, byte_len};
use crate::dtype::DType;
use crate::error::Result;
use crate::host_vec;
use crate::kernel::BackendKind;
use crate::layout::Layout;
use crate::mask::meta::VarlenMeta;
use crate::primitives::{pack_all, scatter_to_padded_into};
use crate::tensor::{Tensor, TensorView, TensorViewMut};

/// What the steps of one call share.
#[derive(Debug)]
pub(super) struct Steps<'a> {
    pub communicator: &'a mut dyn Communicator,
    pub room: Room<'a>,
    /// Tells the request apart.
    pub tag: Tag,
}

impl Steps<'_> {
    /// Sends whole messages to ranks and receives others; `number` tells exchanges of one name apart.
    pub(super) fn exchange(
        &mut self,
        (operation, number): (&'static str, usize),
        sends: Vec<(usize, &Tensor)>,
        receives: Vec<(usize, &mut Tensor)>,
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let tag = Digest::new().bytes(&self.tag).bytes(operation.as_bytes()).sizes([number]).tag();
        if self.communicator.moves_memory_of(self.room.device) {
            let send = |(to, tensor): (usize, _)| Outgoing { to, from: whole(tensor) };
            let receive = |(from, tensor): (usize, _)| Incoming { from, to: whole_mut(tensor) };
            let sends = sends.into_iter().map(send).collect();
            let receives = receives.into_iter().map(receive).collect();
            return self.communicator.exchange(Exchange { operation, tag, sends, receives }, meanwhile);
        }
        let backend = self.room.device.backend()?;
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

fn whole(tensor: &Tensor) -> Transfer<'_> {
    outgoing(tensor.view().input().memory, 0..byte_len(tensor) as u64)
}

fn whole_mut(tensor: &mut Tensor) -> TransferMut<'_> {
    let bytes = 0..byte_len(tensor) as u64;
    incoming(tensor.view_mut().output().memory, bytes)
}

/// The valid rows of several tensors in one piece of memory, one tensor after another: one message. Tensors of which every token is
/// valid are padded ones as they lie there.
#[derive(Debug)]
pub(super) struct Rows<'k> {
    memory: Lent<'k>,
    /// `[total_valid, h, D]` of each.
    shapes: Vec<[usize; 3]>,
}

impl<'k> Rows<'k> {
    /// Room for tensors of so many heads each. None without a valid row.
    pub(super) fn room(
        room: Room<'k>,
        meta: &VarlenMeta,
        heads: impl IntoIterator<Item = usize>,
        (head_dim, dtype): (usize, DType),
    ) -> Result<Option<Self>> {
        let rows = meta.total_valid();
        if rows == 0 {
            return Ok(None);
        }
        let shapes: Vec<_> = heads.into_iter().map(|heads| [rows, heads, head_dim]).collect();
        let elements = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum();
        Ok(Some(Self { memory: room.tensor(dtype, &[elements])?, shapes }))
    }

    /// Of `[B, S, h, D]` tensors, by one launch where the device can. None without a valid row.
    pub(super) fn pack<const N: usize>(
        room: Room<'k>,
        tensors: [TensorView<'_>; N],
        meta: &VarlenMeta,
    ) -> Result<Option<Self>> {
        let Some(first) = tensors.first() else { return Ok(None) };
        let row = (first.shape()[3], first.dtype());
        let device = room.device;
        let made = Self::room(room, meta, tensors.iter().map(|tensor| tensor.shape()[2]), row)?;
        let Some(mut packed) = made else { return Ok(None) };
        let parts = packed.memory.view_mut().split_into(&packed.shapes)?;
        let mut parts = parts.into_iter();
        let copies = tensors.map(|tensor| Some(("padded", tensor, "packed", parts.next()?)));
        let copies: Vec<_> = copies.into_iter().flatten().collect();
        if device.capabilities().backend == BackendKind::Wgpu {
            // One launch cannot bind a buffer as several outputs.
            for copy in copies {
                pack_all(device, [copy], meta, |op| device.backend()?.execute(op))?;
            }
            return Ok(Some(packed));
        }
        // There is a part for each tensor.
        if let Ok(copies) = <[_; N]>::try_from(copies) {
            pack_all(device, copies, meta, |op| device.backend()?.execute(op))?;
        }
        Ok(Some(packed))
    }

    /// Of a padded tensor that is given up: it is the message itself if all its tokens are valid. None without a valid row.
    pub(super) fn of_padded(room: Room<'k>, padded: Lent<'k>, meta: &VarlenMeta) -> Result<Option<Self>> {
        if !meta.is_all_valid() || meta.is_empty() {
            return Self::pack(room, [padded.view()], meta);
        }
        let &[_, _, heads, head_dim] = padded.shape() else { return Ok(None) };
        Ok(Some(Self { shapes: vec![[meta.total_valid(), heads, head_dim]], memory: padded }))
    }

    pub(super) fn memory(&self) -> &Tensor {
        &self.memory
    }

    pub(super) fn memory_mut(&mut self) -> &mut Tensor {
        &mut self.memory
    }

    /// One of the tensors, `[total_valid, h, D]`.
    pub(super) fn part(&self, which: usize) -> Result<TensorView<'_>> {
        let layout = Layout::contiguous_at(&self.shapes[which], self.offset(which))?;
        Ok(self.memory.view().with_layout(layout))
    }

    /// One of them as `[B, S, h, D]`, if every token is valid.
    pub(super) fn padded_part(&self, which: usize, meta: &VarlenMeta) -> Result<Option<TensorView<'_>>> {
        if !meta.is_all_valid() {
            return Ok(None);
        }
        let [_, heads, head_dim] = self.shapes[which];
        let shape = [meta.batch(), meta.seq(), heads, head_dim];
        Ok(Some(self.memory.view().with_layout(Layout::contiguous_at(&shape, self.offset(which))?)))
    }

    fn offset(&self, which: usize) -> u64 {
        self.shapes[..which].iter().map(|shape| shape.iter().product::<usize>() as u64).sum()
    }
}

/// A `[B, S, h, D]` tensor of which the valid rows came from another rank: what the others hold is not specified.
#[derive(Debug)]
pub(super) enum Padded<'a> {
    /// As it came.
    View(TensorView<'a>),
    Own(Lent<'a>),
}

impl<'a> Padded<'a> {
    /// One of the tensors that came, of so many heads; none came if no row is valid.
    pub(super) fn of(
        room: Room<'a>,
        came: Option<&'a Rows<'_>>,
        which: usize,
        meta: &VarlenMeta,
        (heads, head_dim, dtype): (usize, usize, DType),
    ) -> Result<Self> {
        let Some(rows) = came else {
            let shape = [meta.batch(), meta.seq(), heads, head_dim];
            return room.tensor(dtype, &shape).map(Self::Own);
        };
        match rows.padded_part(which, meta)? {
            Some(view) => Ok(Self::View(view)),
            None => {
                let mut padded = room.tensor(dtype, &[meta.batch(), meta.seq(), heads, head_dim])?;
                scatter_to_padded_into(room.device, rows.part(which)?, meta, &mut *padded)?;
                Ok(Self::Own(padded))
            }
        }
    }

    pub(super) fn view(&self) -> TensorView<'_> {
        match self {
            Self::View(view) => *view,
            Self::Own(tensor) => tensor.view(),
        }
    }
}

/// Writes packed rows, or none, to the valid rows of a padded view, and zeros to the others.
pub(super) fn unpack(
    room: Room<'_>,
    rows: Option<TensorView<'_>>,
    meta: &VarlenMeta,
    to: TensorViewMut<'_>,
) -> Result<()> {
    match rows {
        Some(rows) => scatter_to_padded_into(room.device, rows, meta, to),
        None => {
            let &[_, _, heads, dim] = to.shape() else { return Ok(()) };
            let none = room.tensor(to.dtype(), &[0, heads, dim])?;
            scatter_to_padded_into(room.device, &*none, meta, to)
        }
    }
}

/// Copies valid rows of `[B, S, h, D]` and writes zeros to the others.
pub(super) fn copy_rows(room: Room<'_>, from: TensorView<'_>, meta: &VarlenMeta, to: TensorViewMut<'_>) -> Result<()> {
    let packed = Rows::pack(room, [from], meta)?;
    let rows = packed.as_ref().map(|rows| rows.part(0)).transpose()?;
    unpack(room, rows, meta, to)
}
