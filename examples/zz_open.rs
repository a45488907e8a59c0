use std::time::Instant;
struct L;
impl log::Log for L {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, r: &log::Record<'_>) {
        if r.target().starts_with("varlen_fa") {
            println!("{} {}", r.target(), r.args())
        }
    }
    fn flush(&self) {}
}
fn main() {
    static LL: L = L;
    log::set_logger(&LL).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    for _ in 0..4 {
        let t = Instant::now();
        let mut config = varlen_fa::Config::from_env().unwrap();
        config.device = varlen_fa::DeviceChoice::Wgpu;
        let device = varlen_fa::Device::with_config(config).unwrap();
        println!("{:?} {}", t.elapsed(), device.name());
    }
}
