//! Images of all sizes.

use super::*;

/// Data at the beginning, at every gigabyte and at the end; zeros between.
fn sparse(size: u64) -> Vec<(u64, Vec<u8>)> {
    let len = 5000_u64;
    let mut places: Vec<u64> = (0..).map(|n| n << 30).take_while(|at| at + 2 * len < size).collect();
    places.push(size - len);
    places.into_iter().map(|at| (at, noise(len as usize, at as u32 | 1))).collect()
}

#[test]
fn two_and_four_gigabytes_and_one_more_byte() {
    for size in [(2 << 30) - 1, 2 << 30, (4 << 30) + 1, 5 << 30] {
        let mut bench = Bench::new();
        let mut peer = bench.source();
        let mut script = Script::new(1, "a");
        let image = script.image_begin("pages-1.img");
        let mut sum = Sum::default();
        let places = sparse(size);
        for (at, bytes) in &places {
            let hole = at - sum.size;
            script.part(image, &Part::Zeros(hole), &mut sum);
            script.part(image, &Part::Data(bytes), &mut sum);
        }
        assert_eq!(sum.size, size);
        script.image_end(image, sum);
        bench.bring(&mut peer, script);
        let restore = bench.take("a");
        let file = bench.open(&restore, "pages-1.img", 0);
        assert_eq!(file.len(), size);
        for (at, bytes) in &places {
            let mut found = vec![1; bytes.len()];
            file.read_exact_at(&mut found, *at).unwrap();
            assert!(found == *bytes, "{size}: at {at}");
        }
        let mut zeros = [1; 100];
        file.read_exact_at(&mut zeros, places[0].1.len() as u64).unwrap();
        assert_eq!(zeros, [0; 100]);
        assert!(bench.info("a").resident < 8 << 20);
    }
}

#[test]
fn images_of_nothing() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let script = Script::new(1, "a").image("none.img", b"").parts("frame.img", &[Part::Data(b"")]);
    bench.bring(&mut peer, script);
    let restore = bench.take("a");
    for name in ["none.img", "frame.img"] {
        assert_eq!(bench.read(&restore, name), b"");
    }
    // And a snapshot of no images.
    bench.bring(&mut peer, Script::new(2, "b"));
    let restore = bench.take("b");
    bench.refused(&restore, read("a.img", 0));
}

#[test]
fn sizes_around_what_the_heap_keeps() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let sizes = [1, 4095, 4096, 65_535, 65_536, 65_537, 70_000, (1 << 20) + 1];
    let mut script = Script::new(1, "a");
    for size in sizes {
        script = script.image(&format!("i{size}"), &noise(size, 5));
        let zeros = size as u64;
        script =
            script.parts(&format!("z{size}"), &[Part::Zeros(zeros), Part::Data(b"x"), Part::Zeros(zeros)]);
    }
    bench.bring(&mut peer, script);
    let restore = bench.take("a");
    for size in sizes {
        assert!(bench.read(&restore, &format!("i{size}")) == noise(size, 5), "{size}");
        let expected = [vec![0; size], b"x".to_vec(), vec![0; size]].concat();
        assert!(bench.read(&restore, &format!("z{size}")) == expected, "{size}");
    }
}

#[test]
fn a_hundred_thousand_images_need_no_descriptors() {
    let mut bench = Bench::new();
    let mut peer = bench.source();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    let mut script = Script::new(1, "a");
    for n in 0..100_000_u32 {
        script = script.image(&format!("core-{n}.img"), &n.to_le_bytes());
    }
    // Those that the heap does not keep lie in one file.
    for n in 0..5000_u32 {
        let parts = [Part::Zeros(65_537), Part::Data(&n.to_le_bytes())];
        script = script.parts(&format!("pages-{n}.img"), &parts);
    }
    bench.bring(&mut peer, script);
    // Tests beside this one have some of their own.
    assert!(open() < before + 2000);
    let restore = bench.take("a");
    for n in [0, 4999_u32] {
        let pages = bench.read(&restore, &format!("pages-{n}.img"));
        assert!(pages[..65_537].iter().all(|byte| *byte == 0) && pages[65_537..] == n.to_le_bytes());
    }
    for n in [0, 1, 77_777, 99_999_u32] {
        assert_eq!(bench.read(&restore, &format!("core-{n}.img")), n.to_le_bytes());
    }
}
