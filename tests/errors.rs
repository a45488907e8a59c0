//! What errors say: the argument or variable, what was expected and what came, for every variant.

use varlen_fa::{DType, Error};

fn owned(text: &str) -> String {
    text.to_owned()
}

/// Each variant, and all that its message must say, in this order.
#[test]
fn messages_name_the_argument_what_was_expected_and_what_came() {
    let cases = [
        (Error::Rank { argument: "q", expected: "4: [B, S, H, D]", got: 3 }, ["`q`", "4: [B, S, H, D]", "3"]),
        (Error::Shape { argument: "k", expected: vec![2, 5], got: vec![2, 6] }, ["`k`", "[2, 5]", "[2, 6]"]),
        (Error::Broadcast { expected: vec![2, 4, 6, 5], got: vec![3] }, ["`bias`", "[3]", "[2, 4, 6, 5]"]),
        (Error::HeadsNotDivisible { num_heads: 4, num_kv_heads: 3 }, ["`k`", "num_heads = 4", "3"]),
        (Error::HeadsNotDivisible { num_heads: 0, num_kv_heads: 0 }, ["`k`", "at least 1", "got 0"]),
        (Error::HeadDim { got: 513 }, ["`q`", "from 1 to 512", "513"]),
        (
            Error::UnsupportedDType {
                argument: "q",
                device: owned("cuda"),
                expected: vec![DType::F16, DType::Bf16],
                got: DType::F32,
            },
            ["`q`", "f32", "cuda"],
        ),
        (Error::DTypeMismatch { argument: "v", expected: DType::F16, got: DType::Bf16 }, ["`v`", "f16", "bf16"]),
        (
            Error::Sharding { argument: "rank", expected: owned("a rank below 2"), got: owned("5") },
            ["`rank`", "a rank below 2", "5"],
        ),
        (
            Error::RanksDiffer { operation: "agreeing", own_rank: 6, rank: 7, what: owned("masks") },
            ["agreeing", "rank 7 has other masks", "rank 6"],
        ),
        (
            Error::RankLost { operation: "gathering", rank: 3, why: owned("it gave up") },
            ["gathering", "rank 3", "it gave up"],
        ),
        (
            Error::RankTimedOut { operation: "gathering", rank: 3, limit: std::time::Duration::from_secs(4) },
            ["gathering", "rank 3", "4s"],
        ),
        (Error::InnerStride { argument: "q", got: 2 }, ["`q`", "stride 1", "2"]),
        (Error::Misaligned { argument: "out", expected: 4, got: 6 }, ["`out`", "4 bytes", "6"]),
        (Error::BufferTooSmall { argument: "q", expected: 10, got: 8 }, ["`q`", "10", "8"]),
        (Error::Overlap { argument: "out", other: "v" }, ["`out`", "may share memory", "`v`"]),
        (
            Error::SelfOverlap { argument: "out", shape: vec![2, 8], strides: vec![4, 1] },
            ["`out`", "[4, 1]", "may put elements of shape [2, 8]"],
        ),
        (
            Error::View { argument: "range", expected: owned("a range"), got: owned("3..2") },
            ["`range`", "a range", "3..2"],
        ),
        (Error::Length { argument: "mask", expected: 6, got: 5 }, ["`mask`", "6", "5"]),
        (Error::MaskSize { argument: "mask", expected: [2, 5], got: [2, 6] }, ["`mask`", "[2, 5]", "[2, 6]"]),
        (
            Error::MaskRow { argument: "runs", row: 1, expected: owned("a range inside 0..4"), got: owned("3..5") },
            ["`runs`", "row 1: a range inside 0..4", "3..5"],
        ),
        (
            Error::RangesSize { argument: "ranges", expected: owned("[2, 6, 5]"), got: owned("[2, 6, 6]") },
            ["`ranges`", "ranges for [2, 6, 5]", "[2, 6, 6]"],
        ),
        (
            Error::CuSeqlens { argument: "cu_seqlens_q", expected: owned("a first value of 0"), got: owned("1") },
            ["`cu_seqlens_q`", "a first value of 0", "1"],
        ),
        (Error::SoftmaxScale { got: f32::INFINITY }, ["`softmax_scale`", "finite", "inf"]),
        (
            Error::ScoreModifier { argument: "softcap", expected: owned("a finite number"), got: owned("-1") },
            ["`softcap`", "a finite number", "-1"],
        ),
        (
            Error::TooLarge { argument: "shape", limit_name: "max_buffer_size", limit: 8, got: 9 },
            ["`shape`", "max_buffer_size allows 8", "9"],
        ),
        (
            Error::Environment { variable: "VARLEN_FA", expected: owned("0 or 1"), got: owned("2") },
            ["VARLEN_FA", "0 or 1", "2"],
        ),
        (
            Error::UnknownKernel { expected: owned("sm80 or sm90"), got: owned("sm70") },
            ["`kernel`", "sm80 or sm90", "sm70"],
        ),
        (Error::DeviceMismatch { argument: "q", expected: owned("wgpu"), got: owned("cpu") }, ["`q`", "wgpu", "cpu"]),
        (Error::DeviceKind { argument: "device", expected: "wgpu", got: owned("cpu") }, ["`device`", "wgpu", "cpu"]),
        (
            Error::DeviceLimit { limit_name: "max_bind_groups", expected: owned("at least 1"), got: 0 },
            ["max_bind_groups", "at least 1", "0"],
        ),
        (Error::QueueMismatch, ["`queue`", "the queue of `device`", "another device"]),
        (
            Error::BufferUsage { argument: "buffer", missing: owned("STORAGE") },
            ["`buffer`", "created with usage STORAGE", ""],
        ),
        (
            Error::BufferUnusable { argument: "k", why: owned("it is mapped") },
            ["`k`", "cannot be used", "it is mapped"],
        ),
        (
            Error::Handle { argument: "stream", expected: owned("one stream"), got: owned("0x2") },
            ["`stream`", "one stream", "0x2"],
        ),
        (
            Error::StreamCaptured { device: owned("cuda"), operation: "timing" },
            ["cuda", "timing is not possible", "captured"],
        ),
        (
            Error::DeviceUnavailable { device: owned("cuda:1"), why: owned("no driver") },
            ["cuda:1", "not available", "no driver"],
        ),
        (
            Error::NotApplicable { argument: "path", got: owned("fused"), why: owned("no metadata") },
            ["`path`", "fused", "no metadata"],
        ),
        (Error::OutOfMemory { device: owned("cpu"), requested: 64, why: owned("full") }, ["cpu", "64", "full"]),
        (Error::DeviceLost { device: owned("wgpu"), why: owned("gone") }, ["wgpu", "lost", "gone"]),
        (Error::Backend { device: owned("wgpu"), operation: "mapping", why: owned("no") }, ["wgpu", "mapping", "no"]),
    ];
    for (error, parts) in cases {
        let message = error.to_string();
        let mut rest = message.as_str();
        for part in parts {
            let Some((_, after)) = rest.split_once(part) else {
                panic!("{message:?} does not say {part:?} after what comes before it in {parts:?}");
            };
            rest = after;
        }
    }
}

/// Errors travel between threads and into `Box<dyn Error>`.
#[test]
fn errors_are_ordinary_values() {
    fn takes<E: std::error::Error + Send + Sync + Clone + PartialEq + 'static>(error: E) -> Box<dyn std::error::Error> {
        Box::new(error)
    }
    let boxed = takes(Error::HeadDim { got: 12 });
    assert_eq!(boxed.downcast_ref::<Error>(), Some(&Error::HeadDim { got: 12 }));
}

/// 0 heads are not divided by anything.
#[test]
fn zero_heads_are_not_called_indivisible() {
    for num_heads in [0, 4] {
        let message = Error::HeadsNotDivisible { num_heads, num_kv_heads: 0 }.to_string();
        assert!(!message.contains("divide"), "{message}");
    }
}
