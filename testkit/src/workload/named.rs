//! Workloads that have a name.

/// Names and the SPECs they stand for: five that were measured against other libraries on one H200, a
/// long sequence of one batch row, and two of a size for a CPU.
///
/// The `prefix` lengths are those of the measured runs: PyTorch's `randint(256, 1793, (16,))` and `randint(16, 513, (64,))`
/// on its CPU generator with seed 0. Their means are 0.499 and 0.477 of the sequence.
pub const NAMED: [(&str, &str); 8] = [
    ("joint-1024-b1", "joint:text=512:image=4096:valid=37:heads=24:dim=128"),
    ("joint-1024-b8", "joint:text=256:image=4096:valid=12,37,80,211,256,5,150,64:heads=24:dim=128"),
    ("joint-512-b8", "joint:text=256:image=1024:valid=12,37,80,211,256,5,150,64:heads=24:dim=128"),
    (
        "prefix-2048-b16",
        "prefix:len=2048:valid=785,500,708,542,1732,262,1039,557,1692,327,1482,1589,930,1430,1299,1483:heads=24:dim=128",
    ),
    (
        "prefix-512-b64",
        "prefix:len=512:valid=244,460,485,165,332,438,232,320,412,308,151,114,374,105,424,195,370,95,167,186,393,396,\
         195,347,97,440,206,124,199,111,353,114,48,168,474,188,327,158,101,125,321,16,380,399,302,335,294,104,104,343,\
         36,55,173,49,502,175,122,412,249,102,411,74,162,354:heads=12:dim=64",
    ),
    ("square-16384", "prefix:len=16384:valid=16320:heads=24:dim=128"),
    ("joint-small", "joint:text=64:image=256:valid=20,48,5,64:heads=8:dim=64"),
    ("prefix-half", "prefix:len=512:valid=96,192,320,416:heads=8:dim=64"),
];

#[cfg(test)]
mod tests {
    use super::NAMED;
    use crate::workload::Workload;

    #[test]
    fn sizes_are_those_of_the_measured_workloads() {
        // Name, batch, sequence, heads, dim, valid share to two digits.
        for (name, batch, seq, heads, dim, share) in [
            ("joint-1024-b1", 1, 4608, 24, 128, 0.90),
            ("joint-1024-b8", 8, 4352, 24, 128, 0.96),
            ("joint-512-b8", 8, 1280, 24, 128, 0.88),
            ("prefix-2048-b16", 16, 2048, 24, 128, 0.50),
            ("prefix-512-b64", 64, 512, 12, 64, 0.48),
            ("square-16384", 1, 16384, 24, 128, 1.00),
            ("joint-small", 4, 320, 8, 64, 0.91),
            ("prefix-half", 4, 512, 8, 64, 0.50),
        ] {
            let workload = Workload::parse(name).unwrap();
            assert_eq!(workload.name, name);
            assert_eq!((workload.batch, workload.seq), (batch, seq), "{name}");
            assert_eq!((workload.heads, workload.kv_heads, workload.dim), (Some(heads), None, Some(dim)), "{name}");
            assert!((workload.valid_fraction() - share).abs() < 0.005, "{name}: {}", workload.valid_fraction());
        }
        assert_eq!(Workload::named().unwrap().len(), NAMED.len());
    }

    #[test]
    fn flops_agree_with_the_measured_rates() {
        // FA3 varlen alone on one H200: milliseconds and TFLOP/s, each given to three digits.
        for (name, ms, tflops) in [
            ("joint-1024-b1", 0.306, 685.0),
            ("joint-1024-b8", 2.77, 625.0),
            ("joint-512-b8", 0.242, 518.0),
            ("prefix-2048-b16", 0.515, 491.0),
            ("prefix-512-b64", 0.088, 173.0),
        ] {
            let workload = Workload::parse(name).unwrap();
            let flops = workload.attention_flops(workload.heads.unwrap(), workload.dim.unwrap());
            let measured = ms * 1e-3 * tflops * 1e12;
            assert!((flops / measured - 1.0).abs() < 0.01, "{name}: {flops:.4e} {measured:.4e}");
        }
    }
}
