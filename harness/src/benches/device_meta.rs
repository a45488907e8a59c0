//! Times attention under metadata that the device built beside the same call under the host's, in turns on one device. In the row
//! "device, rebuilt" each time begins with a rebuild, as a request of that many layers does.
//!
//! ```text
//! cargo bench --bench device_meta -- --device cuda --dtype bf16
//! cargo bench --bench device_meta -- --device cuda --dtype bf16 --causal --left
//! ```

use std::io::Write;

use anyhow::Result;
use clap::Args;
use varlen_fa::{
    AttentionMask, Device, DeviceMemory, DeviceVarlenMeta, Element, KeyMask, KeyRanges, Layout, MaskDType,
    MaskedAttention, Path, VarlenMeta,
};

use crate::arguments::Problem;
use crate::comparison::{self, Comparison};
use crate::random::tensor;
use crate::report::Report;
use crate::times::{in_turns, repeats_of};

/// Time metadata that the device built against the host's.
#[derive(Debug, Args)]
pub struct DeviceMetadata {
    /// Queries see keys up to their own place
    #[arg(long)]
    causal: bool,
    /// The mask turned around: padding comes before the tokens of a row
    #[arg(long)]
    left: bool,
}

impl Comparison for DeviceMetadata {
    /// Qwen-Image at 1024² and at 512², an encoder's batch, and a mask with holes.
    const DEFAULTS: &'static [&'static str] =
        &["joint-1024-b1", "joint-512-b8", "prefix-2048-b16", "random:len=4096:p=0.95:batch=2:heads=24:dim=128"];
    const SMOKE: &'static str = "joint:text=5:image=20:valid=3,5:heads=2:dim=16";

    fn time<T: Element>(&self, device: &Device, problem: &Problem, rounds: usize, report: &mut Report) -> Result<()> {
        let (shape, kv_shape) = (problem.shape(), problem.kv_shape());
        let [batch, seq, ..] = shape;
        let tensor = |seed, shape: [usize; 4]| tensor::<T>(device, seed, &shape);
        let (q, k, v) = (tensor(1, shape)?, tensor(2, kv_shape)?, tensor(3, kv_shape)?);
        let mut out = tensor(4, shape)?;
        let mut keep = problem.workload.mask.clone();
        if self.left {
            keep.chunks_mut(seq).for_each(<[bool]>::reverse);
        }
        let host = VarlenMeta::from_key_mask(&KeyMask::from_bool(batch, seq, &keep)?)?;
        let causal = self.causal.then(|| KeyRanges::causal([batch, seq, seq])).transpose()?;
        let bytes: Vec<u8> = keep.iter().map(|&keep| u8::from(keep)).collect();
        let mut memory = DeviceMemory::alloc(device, bytes.len() as u64)?;
        memory.write(&bytes)?;
        let view = memory.mask_view(MaskDType::U8, Layout::contiguous(&[batch, seq])?);
        let mut on_device = DeviceVarlenMeta::new(device, batch, seq)?;
        on_device.rebuild(view)?;
        // Built anew before the calls of each time, which are the layers of a request.
        let mut of_request = DeviceVarlenMeta::new(device, batch, seq)?;

        let attention = MaskedAttention::new(device);
        let forced = |path| MaskedAttention::new(device).with_path(path);
        let rows = [
            ("host", Some(AttentionMask::varlen(&host)), attention.clone()),
            ("device", Some(AttentionMask::varlen(&on_device)), attention.clone()),
            ("device, rebuilt", None, attention),
            ("host, fused", Some(AttentionMask::varlen(&host)), forced(Path::Fused)),
            ("device, packed", Some(AttentionMask::varlen(&on_device)), forced(Path::Packed)),
        ];
        let repeats = repeats_of(device);
        let timed = in_turns(device, rounds, rows.len(), |row| {
            let (_, mask, attention) = &rows[row];
            let mask = match *mask {
                Some(mask) => mask,
                None => {
                    of_request.rebuild(view)?;
                    AttentionMask::varlen(&of_request)
                }
            };
            let mask = causal.as_ref().map_or(mask, |causal| mask.with_ranges(causal));
            let mut call = || attention.forward_into(&q, &k, &v, mask, &mut out);
            for _ in 1..repeats {
                call()?;
            }
            call()
        })?;
        let (side, ranges) =
            (if self.left { ", the last ones" } else { "" }, if self.causal { ", causal" } else { "" });
        let valid = format!("{} of {} tokens valid{side}{ranges}", host.total_valid(), batch * seq);
        writeln!(report.text, "\n{shape:?} {}, {valid}", T::DTYPE)?;
        let rows = rows.iter().map(|&(row, ..)| row).zip(timed);
        comparison::report_ratios((report, device, problem), (host.total_valid(), repeats), rows)
    }
}
