//! The named cases that every device must pass.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use anyhow::Result;
use libtest_mimic::Completion;
use varlen_fa::{BackendKind, DType, Device, Path};
use varlen_fa_testkit::{CASES, Case, OracleShape};

use super::call::{Call, Mask};
use super::check::{Reference, Rules};
use super::trials::{Trials, Variant};

/// Cases with more elements than this are held against a sample of the oracle's rows, one case at a time.
const LARGE: usize = 1 << 20;
/// Rows of that sample, half of them at the edges of batch rows and runs.
const SAMPLE: usize = 3000;

pub fn register(trials: &mut Trials) {
    let device = trials.device().clone();
    for case in &CASES {
        let heads = heads(case, &device);
        let mut name = case.name.to_owned();
        let mut dtypes = device.capabilities().dtypes.to_vec();
        if heads < case.heads {
            name = format!("{name}_{heads}_of_{}_heads", case.heads);
            eprintln!("{name}: fewer heads, since {} is emulated", device.capabilities());
        }
        if heads == 1 {
            dtypes.retain(|&dtype| dtype == DType::F16);
            eprintln!("{name}: in f16 and on the fused path alone, since {} is emulated", device.capabilities());
        }
        trials.each_path_of(&dtypes, &name, move |variant| {
            if heads == 1 && variant.path != Some(Path::Fused) {
                return Ok(Completion::ignored_with("an emulated GPU takes 15 seconds: prod_c2 runs on this path"));
            }
            check(case, heads, variant).map(|()| Completion::Completed)
        });
    }
}

/// All heads on hardware; on emulated devices as many as end within seconds.
fn heads(case: &Case, device: &Device) -> usize {
    let capabilities = device.capabilities();
    let most_work = match (capabilities.is_software, capabilities.backend) {
        (false, _) => return case.heads,
        (true, BackendKind::Cpu) => 40_000_000_000,
        (true, _) => 1_300_000_000,
    };
    let work_of_a_head = case.batch * case.seq().pow(2) * case.head_dim;
    (most_work / work_of_a_head).clamp(1, case.heads)
}

fn check(case: &'static Case, heads: usize, variant: &Variant) -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let elements = case.elements() / case.heads * heads;
    let _alone = (elements > LARGE).then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));

    let shape = OracleShape::self_attention(case.batch, case.seq(), heads, case.head_dim);
    let call = Call::random(shape, Mask::Varlen(case.mask()), variant.dtype, 26318);
    let bits = call.run(variant)?;
    call.judge(&bits, &*reference(case, &call)?, Rules::standard(variant.dtype))
}

/// The oracle's answer, computed once for all paths and kernels, and for all devices that run as many heads.
fn reference(case: &'static Case, call: &Call) -> Result<Arc<Reference>> {
    type Answers = HashMap<(&'static str, usize, DType), Arc<Reference>>;
    static ANSWERS: LazyLock<Mutex<Answers>> = LazyLock::new(Mutex::default);
    let key = (case.name, call.shape.heads, call.dtype);
    let find = || ANSWERS.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    if let Some(found) = find() {
        return Ok(found);
    }
    let limit = if call.values[0].len() > LARGE { SAMPLE } else { usize::MAX };
    let answer = Arc::new(call.reference(limit)?);
    let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
    answers.insert(key, Arc::clone(&answer));
    Ok(answer)
}
