// Heads are written once.

fn store_joint(element: u32, part: Part) {}
