//! Casts on a GPU give what the host's give, over a fake driver that runs the kernels' own source.
#![cfg(feature = "cuda")]

#[path = "common/fake_driver.rs"]
mod fake_driver;

use fake_driver::{Fake, Report};
use half::f16;
use std::thread;
use unladen::{
    DType, cast,
    cuda::{Arg, Context, GpuCasts, Memory, Module},
    memory::Reservation,
};

fn memory(context: &Context, len_bytes: u64) -> Memory {
    Memory::new(context, Reservation::uncounted(len_bytes)).unwrap()
}

/// Casts on the GPU, from some place in memory to another.
fn on_gpu(casts: &GpuCasts, context: &Context, [from, to]: [DType; 2], source: &[u8]) -> Vec<u8> {
    let n_elems = source.len() as u64 / from.size_bytes();
    let (source_byte, target_byte) = (3 * from.size_bytes(), 5 * to.size_bytes());
    let from_memory = memory(context, source_byte + source.len() as u64);
    from_memory.write(source_byte, source).unwrap();
    let mut target = vec![0; (n_elems * to.size_bytes()) as usize];
    let to_memory = memory(context, target_byte + target.len() as u64);
    casts.cast([from, to], (&from_memory, source_byte), (&to_memory, target_byte), n_elems).unwrap();
    to_memory.read(target_byte, &mut target).unwrap();
    target
}

#[track_caller]
fn assert_as_on_the_host(casts: &GpuCasts, context: &Context, [from, to]: [DType; 2], source: &[u8]) {
    let found = on_gpu(casts, context, [from, to], source);
    let mut expected = vec![0; found.len()];
    cast::cast(from, to, source, &mut expected);
    let elem_bytes = to.size_bytes() as usize;
    for (at, (found, expected)) in found.chunks(elem_bytes).zip(expected.chunks(elem_bytes)).enumerate() {
        assert!(found == expected, "{from} to {to}, element {at}: {found:x?}, not {expected:x?}");
    }
}

#[test]
fn every_number_of_sixteen_bits_is_widened_as_on_the_host() {
    let test = "every_number_of_sixteen_bits_is_widened_as_on_the_host";
    if Fake::over(test, Report::assert_clean).is_none() {
        return;
    }
    let context = Context::open(1).unwrap();
    let casts = GpuCasts::load(&context).unwrap();
    let every: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for from in [DType::F16, DType::BF16] {
        for to in [DType::F32, DType::F64] {
            assert_as_on_the_host(&casts, &context, [from, to], &every);
        }
    }
    // Among them are all NaNs, quiet and signalling. The host's processor has an instruction for what comes from a half,
    // and what goes without it gives the same.
    let widened = on_gpu(&casts, &context, [DType::F16, DType::F32], &every);
    for (half, found) in (0..=u16::MAX).zip(widened.as_chunks().0) {
        let expected = f16::from_bits(half).to_f32_const().to_bits();
        assert_eq!(u32::from_le_bytes(*found), expected, "{half:#x}");
    }
    // With the upper half of every number in turn, and a lower half that alone can make a NaN of it.
    for lower_half in [0u16, 1, 0x9e37] {
        let some: Vec<u8> =
            (0..=u16::MAX).flat_map(|it| [lower_half, it]).flat_map(u16::to_le_bytes).collect();
        assert_as_on_the_host(&casts, &context, [DType::F32, DType::F64], &some);
    }
    // More elements than threads.
    let many = every.repeat(17);
    assert_as_on_the_host(&casts, &context, [DType::F16, DType::F32], &many);
    assert_as_on_the_host(&casts, &context, [DType::BF16, DType::F32], &[]);
}

#[test]
fn a_cast_returns_when_its_kernel_has_run() {
    let Some(fake) = Fake::over("a_cast_returns_when_its_kernel_has_run", Report::assert_clean) else {
        return;
    };
    let context = Context::open(0).unwrap();
    let casts = GpuCasts::load(&context).unwrap();
    let [source, target] = [memory(&context, 2000), memory(&context, 4000)];
    source.write(0, &[0x3c; 2000]).unwrap();
    fake.tell("hold on");
    thread::scope(|scope| {
        let casting =
            scope.spawn(|| casts.cast([DType::F16, DType::F32], (&source, 0), (&target, 0), 1000).unwrap());
        // The kernel runs when it is let go of, which is not before somebody waits for it.
        let is_waited_for = || fake.report().0["launches"] == 1 && fake.report().0["waiting"] == 1;
        while !is_waited_for() {
            assert!(!casting.is_finished(), "the cast returned before its kernel ran");
            thread::yield_now();
        }
        fake.tell("");
    });
    let mut bytes = [0; 4000];
    target.read(0, &mut bytes).unwrap();
    let one = f16::from_le_bytes([0x3c; 2]).to_f32();
    assert!(bytes.as_chunks().0.iter().all(|it| f32::from_le_bytes(*it) == one));
}

#[test]
fn casts_that_would_go_wrong_are_refused() {
    if Fake::over("casts_that_would_go_wrong_are_refused", Report::assert_clean).is_none() {
        return;
    }
    let context = Context::open(0).unwrap();
    let casts = GpuCasts::load(&context).unwrap();
    let [source, target] = [memory(&context, 64), memory(&context, 64)];
    let widen = [DType::F16, DType::F32];
    let refused = |dtypes, source: (&Memory, u64), target: (&Memory, u64), n_elems| {
        let error = casts.cast(dtypes, source, target, n_elems).unwrap_err();
        assert_eq!(error.kind(), "Device", "{error}");
        error.to_string()
    };
    let words = refused([DType::F32, DType::F16], (&source, 0), (&target, 0), 1);
    assert_eq!(words, "cuda:0: there is no cast from float32 to float16 on a GPU");
    assert!(!GpuCasts::can_cast(DType::F32, DType::F16) && GpuCasts::can_cast(DType::F16, DType::F32));
    assert!(refused(widen, (&source, 0), (&target, 0), 17).contains("outside"));
    assert!(refused(widen, (&source, 62), (&target, 0), 2).contains("outside"));
    assert!(refused(widen, (&source, 0), (&target, 0), u64::MAX).contains("outside"));
    assert!(refused(widen, (&source, u64::MAX), (&target, 0), 0).contains("outside"));
    assert!(refused(widen, (&source, 1), (&target, 0), 1).contains("not aligned"));
    assert!(refused(widen, (&source, 0), (&target, 2), 1).contains("not aligned"));
    assert!(refused(widen, (&source, 8), (&source, 0), 3).contains("overlap"));
    casts.cast(widen, (&source, 8), (&source, 0), 2).unwrap();
    let elsewhere = memory(&Context::open(1).unwrap(), 64);
    assert!(refused(widen, (&source, 0), (&elsewhere, 0), 1).contains("cuda:1"));
}

#[test]
fn code_that_the_driver_does_not_take_is_an_error() {
    let test = "code_that_the_driver_does_not_take_is_an_error";
    let Some(fake) = Fake::over(test, Report::assert_clean) else { return };
    let context = Context::open(0).unwrap();
    let ptx = ".version 8.0\n.target sm_60\n.address_size 64\n.visible .entry selftest_fill_u32(.param .u64 a, .param .u32 b, .param .u32 c) { ret; }\n";
    let words = |ptx: &str| Module::load(&context, ptx).unwrap_err().to_string();
    assert!(words("nothing").contains("cuModuleLoadData: CUDA_ERROR_INVALID_PTX"));
    assert!(words("a\0b").contains("zero byte"));
    let newer = Module::load(&context, &ptx.replace("8.0", "9.0")).unwrap_err();
    assert!(newer.to_string().contains("525") && newer.hint().contains("newer NVIDIA driver"), "{newer}");

    let module = Module::load(&context, ptx).unwrap();
    let missing = module.function("unknown").unwrap_err().to_string();
    assert!(missing.contains("CUDA_ERROR_NOT_FOUND") && missing.contains("`unknown`"), "{missing}");
    let function = module.function("selftest_fill_u32").unwrap();
    drop(module);
    let target = memory(&context, 20);
    let args = [Arg::Memory(&target, 4), Arg::U32(3), Arg::U32(70)];
    let elsewhere = memory(&Context::open(1).unwrap(), 20);
    let launch = |n_blocks, args: &[Arg<'_>]| {
        // SAFETY: these are the kernel's parameters: it writes three numbers, of which there is room for four, and they are
        // read below, which waits for it. Where it is given less, it does not run.
        #[allow(unsafe_code)]
        unsafe {
            function.launch(n_blocks, 32, args)
        }
    };
    target.write(0, &[0; 20]).unwrap();
    launch(0, &args).unwrap();
    assert!(launch(1, &[Arg::Memory(&elsewhere, 0), args[1], args[2]]).is_err());
    assert!(launch(1, &[Arg::Memory(&target, 21), args[1], args[2]]).is_err());
    launch(1, &args).unwrap();
    let mut bytes = [0; 20];
    target.read(0, &mut bytes).unwrap();
    let numbers = bytes.as_chunks().0.iter().map(|it| u32::from_le_bytes(*it)).collect::<Vec<_>>();
    assert_eq!(numbers, [0, 70, 71, 72, 0]);

    fake.tell("fail cuLaunchKernel 1 CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES");
    let failed = launch(1, &args).unwrap_err().to_string();
    assert!(failed.contains("kernel `selftest_fill_u32`") && failed.contains("OUT_OF_RESOURCES"), "{failed}");
}
