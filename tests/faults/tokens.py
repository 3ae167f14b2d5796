"""Words of the file formats: a mutation that inserts one reaches deeper into a reader than random bytes."""

from __future__ import annotations

import struct

TEXT = (b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n", b"\r\n", b"\x0b", b"\x85", b"\xe2\x80\xa8")
PATHS = (b"/", b"../", b"/dev/zero", b"a" * 300, b"\\", b"~", b"%s", b"{}", b"*", b" ")

JSON = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"false", b"NaN", b"-Infinity", b"1e400", b"\\u0000"),
    *(b'"\\ud800"', b"\\ud83d", b"[[", b'{"a":', b"{}", b"[]", b'""', b"9" * 5000, b"-1", b"18446744073709551616"),
    *(b'"id"', b'"image_id"', b'"caption"', b'"file_name"', b'"images"', b'"annotations"', b'"sentences"', b'"raw"'),
    *(b'"filename"', b'"split"', b'"text_id"', b'"text"', b'"image_ids"', b'"feature"', b'"train"', b'"test"'),
    *TEXT,
    *PATHS,
)
CSV = (
    *(b",", b";", b"\t", b"|", b'"', b'""', b'"\n', b"image", b"caption", b"split", b"train", b"test", b"val", b"#0\t"),
    *(b"a" * 140_000, b"sep=;\n", b"image,caption\n", b"0.jpg"),
    *TEXT,
    *PATHS,
)
LINES = (b"{}", b"\t", b",", b";", b"=", b":", b'"', b"[", b"0 ", b"n01440764", b"folder", b"name", *TEXT, *PATHS)
YAML = (
    *(
        b": ",
        b"- ",
        b"\n",
        b"  ",
        b"&a ",
        b"*a",
        b"!!python/object/apply:os.system ",
        b"!!python/name:os.system",
        b"? ",
    ),
    *(b"<<: *a\n", b"[", b"]", b"{", b"}", b"|\n", b">\n", b"%TAG ! tag:\n", b"---\n", b"...\n", b"null", b"0x10"),
    *(b"1_000", b"1e999", b"batch_size: ", b"dataset: ", b"config: ", b"seed: ", b"versions: ", *TEXT, *PATHS),
)
PICKLE = (
    *(bytes([code]) for code in b"().0123NMKJGLIFTVUXBCcsabdelopqrtuhjgPQRSi]}"),
    *(bytes([code]) for code in range(0x80, 0x99)),
    *(b"cos\nsystem\n", b"ctorch\nload\n", b"ctorch.jit\nload\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch\nTensor\n"),
    *(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", b"ctorch._utils\n_rebuild_qtensor\n", b"ctorch\nSize\n"),
    *(b"ctorch._utils\n_rebuild_wrapper_subclass\n", b"ctorch.storage\nUntypedStorage\n", b"ctorch\nDoubleStorage\n"),
    *(b"ctorch\nComplexFloatStorage\n", b"ctorch.nested._internal.nested_tensor\nNestedTensor\n", b"ctorch\ndevice\n"),
    *(b"X\x07\0\0\0storage", b"X\x03\0\0\0cpu", b"X\x04\0\0\0cuda", b"X\x04\0\0\0meta", b"\x8c\x05model"),
    *(b"J" + struct.pack("<i", value) for value in (-1, 2**31 - 1, -(2**31))),
    *(b"\x8a\x08" + struct.pack("<q", value) for value in (-1, 2**62, -(2**63))),
    *(
        b"r" + struct.pack("<I", 2**28),
        b"j" + struct.pack("<I", 2**31),
        b"\x8b\xff\xff\xff\x7f",
        b"I" + b"9" * 5000 + b"\n",
    ),
    *(b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x96" + b"\xff" * 7 + b"\x7f"),
)
ZIP = (
    *(b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08", b"archive/", b"data.pkl", b"constants.pkl"),
    *(b"data/0", b"version", b"byteorder", b"code/", b"big", b"\x08\0", b"\xff\xff\xff\xff", b"/", b"../"),
)
CODE = (
    *(b"def ", b"class ", b"self", b"Tensor", b"return ", b"torch.", b"ops.aten.", b"while True:\n", b"    ", b"\n"),
    *(b"__torch__.", b"training : bool\n", b"torch.from_file", b"CONSTANTS.c0", b"annotate(", b"List[", b"Dict[str, "),
)
TAR = (
    *(b"ustar\000", b"ustar  \0", b"77777777777\0", b"-0000000001\0", b"\x80" + b"\0" * 10 + b"\1", b"\xff" * 12),
    *(
        b"S",
        b"L",
        b"K",
        b"x",
        b"g",
        b"1",
        b"2",
        b"3",
        b"5",
        b"6",
        b"7",
        b"././@LongLink\0",
        b"GNU.sparse.size=9999999999\n",
    ),
    *(b"30 mtime=1e999\n", b"27 GNU.sparse.map=0,1,2,3\n", b"19 path=../../x.jpg\n", b"21 size=99999999999\n"),
    *(b".jpg\0", b".txt\0", b".json\0", b"__key__", b"0" * 8, b"\0" * 512, *TEXT),
)
NPY = (
    *(
        b"\x93NUMPY\1\0",
        b"\x93NUMPY\3\0",
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }",
        b"'|O'",
        b"'<U9'",
    ),
    *(
        b"'<i8'",
        b"'<f4'",
        b"'>f8'",
        b"'|V0'",
        b"[('a', '<i4')]",
        b"(1000000000000,)",
        b"(-1,)",
        b"(0, 5)",
        b"()",
        b"True",
    ),
    *(b"(", b")", b"{", b"}", b"[", b"'", b",", b"#", b"\n", b"\0", b"1L", b"'shape'", b"'descr'", b"((3,), 2)"),
)
PNG = (
    *(
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"PLTE",
        b"tRNS",
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"gAMA",
        b"eXIf",
        b"acTL",
        b"fcTL",
    ),
    *(b"fdAT", b"cHRM", b"sRGB", b"pHYs", b"\x10", b"\3", b"\1", b"\0\0\0\0", b"\x7f\xff\xff\xff"),
)
JPEG = (
    *(
        b"\xff" + bytes([code])
        for code in (0xD8, 0xD9, 0xDA, 0xDB, 0xC0, 0xC2, 0xC4, 0xC9, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE)
    ),
    *(b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0", b"Adobe\0", b"JFIF\0", b"\xff\xff", b"\0\0", b"Photoshop 3.0\08BIM"),
)
TIFF = (
    *(
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        *(struct.pack("<HHII", tag, kind, 1, 2**31) for tag in (256, 257, 258, 277, 278) for kind in (3, 4)),
    ),
    *(struct.pack("<HHII", 259, 3, 1, value) for value in (1, 2, 3, 4, 5, 6, 7, 8, 32773, 34712, 50000, 50001)),
    *(struct.pack("<HHII", tag, 4, 2**31, 8) for tag in (273, 279, 320, 322, 324, 330, 34665, 700, 34675)),
)
GIF = (b"GIF87a", b"GIF89a", b"!\xf9\4", b"!\xff\x0b", b"NETSCAPE2.0", b",", b";", b"\0", b"\xff\xff\xff\xff", b"!\xfe")
WEBP = (b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"ICCP", b"XMP ", b"\xff" * 4)
BMP = (
    b"BM",
    *(struct.pack("<I", value) for value in (12, 40, 64, 108, 124, 0, 1, 2, 3, 4, 5, 6, 2**31)),
    b"\1\0",
    b"\x10\0",
)
BOXES = (
    *(
        b"ftyp",
        b"meta",
        b"iloc",
        b"iinf",
        b"iprp",
        b"ipco",
        b"ispe",
        b"av1C",
        b"mdat",
        b"moov",
        b"avif",
        b"jP  ",
        b"jp2h",
    ),
    *(
        b"ihdr",
        b"colr",
        b"jp2c",
        b"pclr",
        b"cmap",
        b"\xff\x4f",
        b"\xff\x51",
        b"\xff\x52",
        b"\xff\x5c",
        b"\xff\x90",
        b"\xff\x93",
    ),
    *(b"\xff\xd9", b"\0\0\0\1", b"\xff\xff\xff\xff", b"\0\0\0\0"),
)
PNM = (
    b"P1",
    b"P3",
    b"P5",
    b"P6",
    b"P7\n",
    b"Pf",
    b"PF",
    b"#",
    b"\n",
    b" ",
    b"255",
    b"65535",
    b"0",
    b"99999",
    b"\nENDHDR\n",
)
IMAGES = {
    "jpeg": JPEG,
    "png": PNG,
    "tiff": TIFF,
    "gif": GIF,
    "webp": WEBP,
    "bmp": BMP,
    "avif": BOXES,
    "jp2": BOXES,
    "ppm": PNM,
}
ARROW = (
    b"ARROW1",
    b"\xff" * 4,
    b"\0" * 8,
    b"\xff" * 4 + b"\0" * 4,
    *(struct.pack("<q", value) for value in (-1, 2**31, 2**62)),
)
PIXELS = (
    b"PIXELS01",
    *(struct.pack("<ii", *sizes) for sizes in ((0, 0), (-1, -1), (2**31 - 1, 2**31 - 1), (1, 2**30))),
)
