package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pax is an extended header for the next entry. Its records are KEY=VALUE.
func pax(records ...string) entry {
	var body strings.Builder
	for _, r := range records {
		length := len(r) + 3
		for len(strconv.Itoa(length))+len(r)+2 > length {
			length++
		}
		fmt.Fprintf(&body, "%d %s\n", length, r)
	}
	return entry{name: "pax", kind: 'x', body: body.String()}
}

// tarNumber writes octal digits, or where they do not do, base 256.
func tarNumber(field []byte, v int64) {
	if text := fmt.Sprintf("%0*o", len(field)-1, v); v >= 0 && len(text) < len(field) {
		copy(field, text)
		return
	}
	for i := range slices.Backward(field) {
		field[i] = byte(v)
		v >>= 8
	}
	field[0] |= 0x80
}

// The corpus's archives are made for these limits.
const (
	corpusBytes   = 2 << 20
	corpusEntries = 64
)

// A hostile archive either is refused or arrives as a harmless tree.
type hostile struct {
	name    string
	archive []byte
	status  int
	entry   string            // that the error names, or how it begins
	tree    map[string]string // with status 201: what describeNode says of each path
}

type tree = map[string]string

// hostileArchives returns the corpus. Outside is an absolute path with a file "secret",
// which also is neighbour/secret beside the directory that an archive is unpacked to.
func hostileArchives(outside string) []hostile {
	refused := func(name, named string, entries ...entry) hostile {
		return hostile{name, tgz(entries...), 400, named, nil}
	}
	tooLarge := func(name, named string, entries ...entry) hostile {
		return hostile{name, tgz(entries...), 413, named, nil}
	}
	harmless := func(name string, lays tree, entries ...entry) hostile {
		return hostile{name, tgz(entries...), 201, "", lays}
	}
	broken := func(name string, archive []byte) hostile { return hostile{name, archive, 400, "", nil} }
	kind := func(name string, k byte) entry { return entry{name: name, kind: k} }
	unowned := func(name string, e ...entry) hostile { // owners are used by root only
		if os.Geteuid() == 0 {
			return refused(name, "a", e...)
		}
		return harmless(name, tree{"a": "0644 "}, e...)
	}
	owned := func(name string, uid, gid int64) hostile {
		return unowned(name, entry{name: "a", uid: uid, gid: gid})
	}
	typed := func(k byte, name, body string) entry { return entry{name: name, kind: k, mode: 0o755, body: body} }
	sparse := func(size string) []entry {
		return []entry{pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s",
			"GNU.sparse.realsize="+size), file("x", "0\n"+strings.Repeat("\x00", 510))}
	}
	oldest := func(name, body string) []byte { // whose type is NUL
		blocks := file(name, body).bytes()
		blocks[156] = 0
		sealHeader(blocks[:512])
		return blocks
	}
	withSize := func(e entry, field string) []byte {
		blocks := e.bytes()
		copy(blocks[124:136], field)
		sealHeader(blocks[:512])
		return blocks
	}
	longName := func(kind byte, name string) entry {
		return entry{name: "././@LongLink", kind: kind, body: name + "\x00"}
	}
	tooMany := make([]entry, corpusEntries+1)
	for i := range tooMany {
		tooMany[i] = file(fmt.Sprint("f", i), "")
	}
	long := strings.Repeat("abcdefg/", 200)
	zeros := make([]byte, 2*corpusBytes)
	twoFifths := string(zeros[:corpusBytes*2/5])
	good := tgz(dir("d"), file("d/x", strings.Repeat("contents", 300)), symlink("l", "d/x"))
	plain := slices.Concat(tarOf(dir("d"), file("d/x", strings.Repeat("contents", 300))), tarEnd)

	rows := []hostile{
		refused("parent", "../neighbour/secret", file("../neighbour/secret", "pwned")),
		refused("parent further down", "a/../../neighbour/new", file("a/../../neighbour/new", "pwned")),
		refused("parent that stays inside", "a/../x", file("a/../x", "")),
		refused("parent at the end", "a/..", file("a/..", "")),
		refused("parent as a directory", "../", dir("../")),
		refused("parent made by an extended header", "../neighbour/new", pax("path=../neighbour/new"),
			file("x", "")),
		refused("parent made by a GNU long name", "../neighbour/new",
			entry{name: "././@LongLink", kind: 'L', body: "../neighbour/new\x00"}, file("x", "")),
		refused("absolute", outside+"/secret", file(outside+"/secret", "pwned")),
		refused("absolute with two slashes", "//"+outside, file("//"+outside+"/new", "pwned")),
		refused("absolute directory", "/", dir("/")),
		refused("empty name", "", file("", "x")),
		refused("file as the root", ".", file(".", "x")),
		refused("link as the root", "./", symlink("./", "a")),

		refused("link out, absolute, then written through", "l", symlink("l", outside), file("l/secret", "pwned")),
		refused("link out, relative, then written through", "l", symlink("l", "../neighbour"),
			file("l/secret", "pwned")),
		refused("link to the parent", "l", symlink("l", "..")),
		refused("link to the parent with a trailing slash", "l", symlink("l", "../")),
		refused("link to the parent's parent from one level down", "d/l", symlink("d/l", "../../neighbour")),
		refused("link with dots in front", "l", symlink("l", "././/../neighbour")),
		refused("link out through a link's target", "m", dir("a/b"), symlink("l", "a/b"),
			symlink("m", "l/../../..")),
		refused("link with a parent behind a name", "l", dir("d"), symlink("l", "d/../x")),
		refused("link of no length", "l", symlink("l", "")),
		refused("link longer than a path", "l", pax("linkpath="+strings.Repeat("d/", 3000)), symlink("l", "")),
		refused("chain of links out", "b", symlink("a", "b"), symlink("b", ".."),
			file("a/neighbour/secret", "pwned")),
		refused("chain of links inside, written through", "a/x", dir("d"), symlink("b", "d"), symlink("a", "b"),
			file("a/x", "pwned")),
		refused("link inside, written through", "l/x", dir("d"), symlink("l", "d"), file("l/x", "pwned")),
		refused("link inside, directory made through", "l/x/", dir("d"), symlink("l", "d"), dir("l/x/")),
		refused("link inside, link made through", "l/x", dir("d/e"), symlink("l", "d/e"),
			symlink("l/x", "../../..")),
		refused("link to the root, written through", "l/x", symlink("l", "."), file("l/x", "")),
		refused("link to itself, written through", "l/x", symlink("l", "l"), file("l/x", "")),
		refused("link over a file, then written through", "a/x", file("a", "1"), symlink("a", "."),
			file("a/x", "")),
		harmless("link up to the root itself", tree{"a": "d0755", "a/b": "d0755", "a/b/l": "-> ../.."},
			symlink("a/b/l", "../..")),
		harmless("link replaced by a file, not followed", tree{"d": "d0755", "d/x": "0644 old", "l": "0644 new"},
			file("d/x", "old"), symlink("l", "d/x"), file("l", "new")),
		harmless("dangling link replaced by a file, not followed", tree{"l": "0644 new"}, symlink("l", "x"),
			file("l", "new")),
		harmless("link replaced by a directory, not followed", tree{"d": "d0755", "l": "d0700"},
			dir("d"), symlink("l", "d"), entry{name: "l", kind: '5', mode: 0o700}),
		harmless("link replaced through a trailing slash, not followed (CVE-2025-22873)",
			tree{"d": "d0755", "l": "d0700"},
			dir("d"), symlink("l", "d"), entry{name: "l/", kind: '5', mode: 0o700}),
		refused("link written through a trailing slash, not followed (CVE-2025-22873)", "l/", symlink("l", "x"),
			file("l/", "new")),
		harmless("link replaced by a directory of a file's type", tree{"d": "d0755", "l": "d0755"}, dir("d"),
			symlink("l", "d"), typed('0', "l/", "")),
		harmless("link replaced by a hard link", tree{"a": "0644 1", "l": "0644 1"}, file("a", "1"),
			symlink("l", "d"), hardLink("l", "a")),
		harmless("link to itself", tree{"l": "-> l"}, symlink("l", "l")),

		refused("hard link out, relative", "h", hardLink("h", "../neighbour/secret"), file("h", "pwned")),
		refused("hard link out, absolute", "h", hardLink("h", outside+"/secret"), file("h", "pwned")),
		refused("hard link with a parent that stays inside", "h", file("a", ""), dir("d"), hardLink("h", "d/../a")),
		harmless("hard link to a link", tree{"a": "0644 ", "l": "-> a", "h": "-> a"}, file("a", ""),
			symlink("l", "a"), hardLink("h", "l")),
		harmless("hard link to a link, then written", tree{"l": "-> x", "h": "0644 new"}, symlink("l", "x"),
			hardLink("h", "l"), file("h", "new")),
		harmless("hard link to a link in another directory",
			tree{"a": "0644 ", "d": "d0755", "d/l": "-> ../a", "e": "d0755", "e/h": "-> ../a"},
			file("a", ""), symlink("d/l", "../a"), hardLink("e/h", "d/l")),
		refused("hard link to a link, which leads out from its new place", "h", symlink("d/l", "../neighbour"),
			hardLink("h", "d/l"), file("h/secret", "pwned")),
		refused("hard link to a link, which leads above the root from its new place", "a/h",
			symlink("a/b/l", "../.."), hardLink("a/h", "a/b/l")),
		refused("hard link to a link, written through", "h/x", dir("d"), symlink("l", "d"), hardLink("h", "l"),
			file("h/x", "pwned")),
		refused("hard link through a link", "h", file("d/x", ""), symlink("l", "d"), hardLink("h", "l/x")),
		refused("hard link made through a link", "l/h", file("d/x", ""), symlink("l", "d"), hardLink("l/h", "d/x")),
		harmless("hard link to itself", tree{"a": "0644 1"}, file("a", "1"), hardLink("a", "a")),
		harmless("hard link to itself under two spellings", tree{"d": "d0755", "d/a": "0644 1"}, file("d/a", "1"),
			hardLink("./d/a", "d//./a")),
		harmless("hard link to itself, of a link", tree{"l": "-> x"}, symlink("l", "x"), hardLink("l", "l")),
		harmless("hard link to itself, of a directory", tree{"d": "d0755"}, dir("d"), hardLink("d", "d")),
		harmless("hard links to each other", tree{"a": "0644 1", "b": "0644 1"}, file("a", "1"), hardLink("b", "a"),
			hardLink("a", "b"), hardLink("b", "a")),
		refused("hard link to itself, which is not there", "a", hardLink("a", "a")),
		refused("hard link to itself through a link", "l/x", file("d/x", "1"), symlink("l", "d"),
			hardLink("l/x", "l/x")),
		refused("hard link to what is not there", "h", hardLink("h", "x")),
		refused("hard link below what is not there", "h", hardLink("h", "x/y")),
		refused("hard link to a directory", "h", dir("d"), hardLink("h", "d")),
		refused("hard link to the root", "h", hardLink("h", ".")),
		refused("hard link to nothing", "h", hardLink("h", "")),
		harmless("hard link replaced, the other name left alone", tree{"a": "0644 1", "b": "0644 2"},
			file("a", "1"), hardLink("b", "a"), file("b", "2")),

		harmless("empty directory replaced by a file", tree{"d": "0644 1"}, dir("d"), file("d", "1")),
		harmless("empty directory replaced by a link", tree{"d": "-> x"}, dir("d"), symlink("d", "x")),
		refused("empty directory replaced by a link, then written through", "d/x", dir("e"), dir("d"),
			symlink("d", "e"), file("d/x", "pwned")),
		refused("directory replaced by a file", "d", file("d/x", ""), file("d", "")),
		refused("directory of a directory replaced by a file", "d", dir("d/e"), file("d", "")),
		refused("directory replaced by a link", "d", file("d/x", ""), symlink("d", ".")),
		harmless("empty directory replaced by a hard link", tree{"a": "0644 1", "d": "0644 1"}, file("a", "1"),
			dir("d"), hardLink("d", "a")),
		refused("directory replaced by a hard link to its own file", "d", file("d/x", ""), hardLink("d", "d/x")),
		refused("file used as a directory", "a/b", file("a", ""), file("a/b", "")),
		harmless("file replaced by a directory", tree{"a": "d0755", "a/b": "0644 2"}, file("a", "1"), dir("a"),
			file("a/b", "2")),
		harmless("file replaced by a link, then written", tree{"a": "0644 2"}, file("a", "1"), symlink("a", "b"),
			file("a", "2")),
		harmless("file twice", tree{"a": "0644 2"}, file("a", "11"), file("a", "2")),
		harmless("file twice under two spellings", tree{"d": "d0755", "d/a": "0644 2"}, file("d/a", "1"),
			file("./d//a", "2")),
		harmless("directory twice", tree{"d": "d0700", "d/x": "0644 1"}, dir("d"), file("d/x", "1"),
			entry{name: "d", kind: '5', mode: 0o700}),

		refused("character device", "dev", kind("dev", '3')),
		refused("block device", "dev", kind("dev", '4')),
		refused("FIFO", "fifo", kind("fifo", '6')),
		refused("FIFO over a file", "fifo", file("fifo", ""), kind("fifo", '6')),
		refused("unknown type", "a", kind("a", 'Z')),
		refused("type of no meaning", "a", kind("a", 1)),
		harmless("volume label", tree{"a": "0644 1"}, kind("a", 'V'), file("a", "1")),
		harmless("volume label with a hostile name and content", tree{"a": "0644 1"},
			typed('V', "../neighbour/secret", "x"), file("a", "1")),
		refused("continuation of another volume", "a", kind("a", 'M')),
		harmless("GNU dump directory", tree{"d": "d0755", "d/a": "0644 1"}, typed('D', "d/", "Ya\x00Nb\x00\x00"),
			file("d/a", "1")),
		harmless("GNU dump directory of the root", tree{"a": "0644 1"}, typed('D', "./", "Ya\x00\x00"),
			file("a", "1")),
		refused("GNU dump directory outside", "../d/", typed('D', "../d/", "Ya\x00\x00")),
		refused("GNU dump directory through a link", "l/d", dir("d"), symlink("l", "d"), typed('D', "l/d", "")),
		harmless("directory of a file's type", tree{"d": "d0755", "d/a": "0644 1"}, typed('0', "d/", ""),
			file("d/a", "1")),
		harmless("directory of a contiguous file's type", tree{"d": "d0755"}, typed('7', "d/", "")),
		harmless("directory of a file's type, by its long name", tree{"d": "d0755", "d/a": "0644 1"},
			pax("path=d/"), typed('0', "x", ""), file("d/a", "1")),
		harmless("the root of a file's type", tree{"a": "0644 1"}, typed('0', "./", ""), file("a", "1")),
		refused("file whose name ends in a dot", "a/.", file("a/.", "1")),
		refused("link whose name ends in a dot", "a/./", symlink("a/./", "b")),
		refused("directory of a file's type with content", "d/", typed('0', "d/", "content"), file("a", "")),
		refused("directory of a contiguous file's type with content", "d/", typed('7', "d/", "content"),
			file("a", "")),
		refused("directory with a size", "d", entry{name: "d", kind: '5', size: 1}),
		{"directory of the oldest format", gzipped(oldest("d/", ""), tarEnd), 201, "", tree{"d": "d0644"}},
		{"directory of the oldest format with content", gzipped(oldest("d/", string(tarOf(file("evil", "EVIL")))),
			tarEnd), 400, "d/", nil},
		harmless("setuid, setgid and sticky", tree{"u": "0755 ", "g": "0755 ", "s": "d0777"},
			entry{name: "u", mode: 0o4755}, entry{name: "g", mode: 0o2755}, entry{name: "s", kind: '5', mode: 0o1777}),
		harmless("setuid on the root itself", tree{}, entry{name: "./", kind: '5', mode: 0o7755}),
		harmless("type bits in the mode", tree{"a": "0644 "}, entry{name: "a", mode: 0o20644}),
		harmless("capability", tree{"a": "0644 "},
			pax("SCHILY.xattr.security.capability=\x01\x00\x00\x02\x00\x04\x00\x00"+strings.Repeat("\x00", 12)),
			file("a", "")),
		owned("uid of 2^31", 1<<31, 0),
		owned("gid of 2^31", 0, 1<<31),
		owned("uid that chown takes for none", 1<<32-1, 0),
		owned("uid of 2^32", 1<<32, 0),
		owned("negative uid", -1, 0),
		owned("negative gid", 0, -2),
		unowned("uid of 2^31 in an extended header", pax("uid=2147483648"), file("a", "")),
		harmless("owners that are not used", tree{"a": "0644 1", "h": "0644 1"},
			entry{name: "label", kind: 'V', uid: -1},
			file("a", "1"), entry{name: "h", kind: '1', link: "a", uid: 1 << 32, gid: -1}),

		harmless("global extended header", tree{"a": "0644 1"},
			global("path=../neighbour/new", "size=9", "uid=4294967295", "mode=4777"), file("a", "1")),
		harmless("global extended header with a hostile name", tree{"a": "0644 1"},
			entry{name: "../neighbour/secret", kind: 'g'}, file("a", "1")),
		harmless("size in an extended header that is a plain number", tree{"a": "0644 123", "b": "0644 2"},
			pax("size=003"), file("a", "123"), file("b", "2")),
		refused("size with a sign", "a", pax("size=+3"), file("a", "123")),
		refused("negative zero as a size", "a", pax("size=-0"), file("a", "")),
		refused("empty size", "a", pax("size="), file("a", "123")),
		broken("size with a space", tgz(pax("size= 3"), file("a", "123"))),
		broken("hexadecimal size", tgz(pax("size=0x3"), file("a", "123"))),
		broken("broken size", tgz(pax("size=3.0"), file("a", "123"))),
		refused("size of a directory with a sign", "d", pax("size=+512"), dir("d")),
		refused("size of a global header with a sign", "pax", global("size=+3"), file("a", "123")),
		refused("sparse size with a sign", "s", sparse("+3")...),
		refused("sparse file of Solaris", "f", pax("SUN.holesdata= 0 4", "SCHILY.realsize=4"), file("f", "abc")),
		refused("sparse file of star", "f", pax("SCHILY.realsize=4"), file("f", "abc")),
		refused("name of a sparse file alone", "f", pax("GNU.sparse.name=s"), file("f", "abc")),
		refused("size of a sparse file alone", "f", pax("GNU.sparse.realsize=3"), file("f", "abcde")),
		refused("sparse file of an unknown version", "f", pax("GNU.sparse.major=01", "GNU.sparse.minor=0",
			"GNU.sparse.name=s", "GNU.sparse.realsize=3"), file("f", "0\n"+strings.Repeat("\x00", 510))),
		refused("sparse file of half a version", "f", pax("GNU.sparse.major=1"), file("f", "abc")),
		refused("directory with a sparse file's name", "d", pax("GNU.sparse.name=s"), dir("d")),
		refused("global header between an extended header and its entry", "pax", pax("size=3"), global("comment=x"),
			file("a", "123")),
		refused("global header between a GNU long name and its entry", "pax",
			entry{name: "././@LongLink", kind: 'L', body: "b\x00"}, global("comment=x"), file("a", "")),
		refused("global header between a GNU long link and its entry", "pax",
			entry{name: "././@LongLink", kind: 'K', body: "b\x00"}, global("comment=x"), symlink("a", "c")),
		harmless("global headers before an extended header", tree{"b": "0644 1", "c": "0644 2"},
			global("comment=x"), global("comment=y"), pax("path=b"), file("a", "1"),
			global("comment=x"), entry{name: "././@LongLink", kind: 'L', body: "c\x00"}, file("a", "2")),
		refused("two extended headers", "a", pax("size=3"), pax("comment=x"), file("a", "123")),
		refused("extended header and a GNU long name", "b", pax("comment=x"), longName('L', "b"), file("a", "")),
		refused("two GNU long names", "c", longName('L', "b"), longName('L', "c"), file("a", "")),
		refused("GNU long name and another one in an extended header", "b", longName('L', "b"), pax("path=c"),
			file("a", "")),
		harmless("GNU long name and an extended header", tree{"b": "0644 1"}, longName('L', "b"), pax("mtime=1.5"),
			file("a", "1")),
		harmless("GNU long link and name", tree{"b": "-> c"}, longName('K', "c"), longName('L', "b"),
			symlink("a", "x")),
		harmless("volume label in a global header", tree{"a": "0644 1"}, global("GNU.volume.label=x"),
			file("a", "1")),
		refused("empty path in an extended header", "a", pax("path="), file("a", "")),
		broken("extended header at the end", tgz(file("a", ""), pax("path=b"))),
		{"size behind a NUL", gzipped(withSize(file("a", "1"), "\x000000000001"), tarEnd), 400, "a", nil},
		broken("extended header of negative size", gzipped(withSize(pax("path=b"), "-0000001000\x00"),
			tarOf(file("a", "")), tarEnd)),
		broken("extended header over a megabyte", tgz(pax("comment="+string(zeros[:1<<20])), file("a", ""))),
		tooLarge("extended headers of many bytes", "", pax("comment="+twoFifths), file("a", ""),
			pax("comment="+twoFifths), file("b", ""), pax("comment="+twoFifths), file("c", "")),
		tooLarge("extended headers without an entry", "",
			slices.Repeat([]entry{pax("comment=" + string(zeros[:1000]))}, 2000)...),
		harmless("extended header of many records", tree{"a": "0644 "},
			pax(slices.Repeat([]string{"k=v"}, 50_000)...), file("a", "")),
		broken("extended header that is none", tgz(entry{name: "x", kind: 'x', body: "99999999 path=a\n"},
			file("a", ""))),
		broken("extended header with a size that is none", tgz(pax("size=-1"), file("a", ""))),
		refused("path too long", "abcdefg/", pax("path="+long), file("x", "")),
		refused("path of nearly a megabyte", "abcdefg/", pax("path="+strings.Repeat("abcdefg/", 60_000)),
			file("x", "")),
		refused("parent in a path of nearly a megabyte", "../", pax("path="+strings.Repeat("../", 150_000)),
			file("x", "")),
		refused("GNU long name too long", "abcdefg/", entry{name: "././@LongLink", kind: 'L', body: long},
			file("x", "")),
		refused("component too long", "yyyy", pax("path="+strings.Repeat("y", 256)), file("x", "")),
		refused("component of a link's path too long", "yyyy", pax("path="+strings.Repeat("y", 256)+"/a"),
			symlink("x", "a")),
		broken("NUL in a name", tgz(pax("path=a\x00b"), file("x", ""))),
		broken("NUL in a link", tgz(pax("linkpath=a\x00b"), symlink("l", ""))),
		refused("NUL in a sparse file's name", "a\x00b",
			pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=a\x00b", "GNU.sparse.realsize=0"),
			file("x", "0\n"+strings.Repeat("\x00", 510))),
		refused("control characters in a name", "../\x1b]0;x\a\n", file("../\x1b]0;x\a\n", "")),
		harmless("times out of range", tree{"a": "0644 ", "b": "0644 ", "c": "0644 "},
			pax("mtime=9223372036854775807"), file("a", ""),
			pax("mtime=-9223372036854775808"), file("b", ""), entry{name: "c", mtime: -1}),

		tooLarge("too many entries", "", tooMany...),
		tooLarge("too many directories that no entry names", "", file(strings.Repeat("d/", 40)+"x", ""),
			file(strings.Repeat("e/", 40)+"x", "")),
		refused("more levels than are walked", strings.Repeat("d/", maxDepth+1),
			pax("path="+strings.Repeat("d/", maxDepth+1)+"x"), file("x", "")),
		tooLarge("file over the limit", "big", file("big", string(zeros))),
		tooLarge("files that are over the limit together", "", file("a", twoFifths), file("b", twoFifths),
			file("c", twoFifths)),
		tooLarge("size of all the bits", "big", entry{name: "big", size: math.MaxInt64}),
		tooLarge("sizes whose sum overflows", "big", file("a", "1"), entry{name: "big", size: math.MaxInt64}),
		tooLarge("size of 4 EiB", "big", entry{name: "big", size: 1 << 62}),
		tooLarge("size in an extended header", "big", pax("size=9223372036854775807"), file("big", "")),
		broken("negative size", tgz(entry{name: "a", size: -512}, file("b", ""))),
		tooLarge("old GNU sparse file", "s", entry{name: "s", kind: 'S', realSize: 1 << 40}),
		tooLarge("old GNU sparse file of all the bits", "s", entry{name: "s", kind: 'S', realSize: math.MaxInt64}),
		broken("old GNU sparse file of negative size", tgz(entry{name: "s", kind: 'S', realSize: -1})),
		tooLarge("extended sparse file, version 1.0", "s", sparse("1099511627776")...),
		tooLarge("extended sparse file, version 0.1", "s",
			pax("GNU.sparse.size=1099511627776", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,0", "path=s"),
			file("x", "")),
		tooLarge("extended sparse file, version 0.0", "s",
			pax("GNU.sparse.size=1099511627776", "GNU.sparse.numblocks=1", "GNU.sparse.offset=0",
				"GNU.sparse.numbytes=0", "path=s"), file("x", "")),
		broken("extended sparse file of too many blocks",
			tgz(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=9"),
				file("x", "99999999999999\n"+strings.Repeat("\x00", 497)))),
		tooLarge("sparse files that are over the limit together", "s", slices.Repeat(sparse("1200000"), 2)...),
		tooLarge("sparse files paid for by a directory of negative size", "s",
			slices.Concat([]entry{{name: "d", kind: '5', size: -1 << 40}}, slices.Repeat(sparse("1200000"), 2))...),
		harmless("sparse file within the limit", tree{"s": "0644 \x00\x00\x00"}, sparse("3")...),
		{"gzip bomb behind the end", gzipped(tarOf(file("a", "")), tarEnd, zeros), 413, "", nil},
		{"endless empty gzip blocks", slices.Concat(good[:10],
			bytes.Repeat([]byte{0, 0, 0, 0xff, 0xff}, corpusBytes/5)), 413, "", nil},
		{"endless empty gzip members", bytes.Repeat(gzipped(), corpusBytes/len(gzipped())+1), 413, "", nil},
		{"endless zeros behind the gzip stream", append(tgz(file("a", "")), zeros...), 413, "", nil},

		broken("nothing", nil),
		broken("text", []byte("<html>not found</html>")),
		broken("bare tar", plain),
		broken("zip", []byte("PK\x03\x04\x14\x00\x00\x00\x08\x00")),
		broken("gzip of nothing", gzipped()),
		broken("gzip of text", gzipped([]byte(strings.Repeat("not a tar file ", 100)))),
		broken("header with a wrong checksum", tgz(file("a", "1"), entry{name: "b", checksumOff: true})),
		broken("gzip with a wrong checksum", func() []byte {
			b := slices.Clone(good)
			b[len(b)-8] ^= 1
			return b
		}()),
		broken("gzip with a wrong length", func() []byte { b := slices.Clone(good); b[len(b)-1] ^= 1; return b }()),
		broken("gzip with a flipped bit", func() []byte { b := slices.Clone(good); b[len(b)/2] ^= 16; return b }()),
		broken("garbage behind the gzip stream", append(slices.Clone(good), "garbage"...)),
		broken("garbage behind zeros behind the gzip stream", slices.Concat(good, tarEnd, []byte("garbage"))),
		broken("gzip member behind zeros behind the gzip stream", slices.Concat(good, tarEnd, good)),
		broken("half the start of a gzip member behind the gzip stream", append(slices.Clone(good), 0x1f)),
		{"garbage behind the end of the tar file", gzipped(tarOf(file("a", "1")), tarEnd, []byte("garbage")), 201,
			"", tree{"a": "0644 1"}},
		{"gzip members", slices.Concat(gzipped(plain[:700]), gzipped(), gzipped(plain[700:])), 201, "",
			tree{"d": "d0755", "d/x": "0644 " + strings.Repeat("contents", 300)}},
		{"second tar file behind the first", slices.Concat(tgz(file("a", "1")), tgz(file("b", "2"))), 201, "",
			tree{"a": "0644 1"}},
		broken("gzip member cut off behind a whole tar file",
			slices.Concat(tgz(file("a", "1")), good[:len(good)-9])),
		broken("tar file without an end", gzipped(tarOf(file("a", "1")))),
		broken("tar file with half an end", gzipped(tarOf(file("a", "1")), tarEnd[:512])),
		broken("tar file with one zero block in it", gzipped(tarOf(file("a", "1")), tarEnd[:512],
			tarOf(file("b", "2")), tarEnd)),
		broken("body without padding at the end", gzipped(entry{name: "a", body: "1", noPad: true}.bytes())),
	}
	for _, n := range []int{1, 9, 10, 512, 10130} { // as bsdtar writes them into a pipe
		rows = append(rows, hostile{fmt.Sprint(n, " zeros behind the gzip stream"),
			append(tgz(file("a", "1")), zeros[:n]...), 201, "", tree{"a": "0644 1"}})
	}
	for _, at := range []int{1, 9, 10, 15, len(good) / 2, len(good) - 9, len(good) - 8, len(good) - 4,
		len(good) - 1} {
		rows = append(rows, broken(fmt.Sprint("gzip stream cut off at ", at), good[:at]))
	}
	for _, at := range []int{1, 511, 512, 513, 1023, 1024, 1500, 2000, len(plain) - 1024, len(plain) - 600,
		len(plain) - 512, len(plain) - 1} {
		rows = append(rows, broken(fmt.Sprint("tar file cut off at ", at), gzipped(plain[:at])))
	}
	return rows
}

// readQuietly reads a file without a change of its access time.
func readQuietly(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOATIME, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	content, err := io.ReadAll(f)
	return string(content), err
}

// wantSameTree reports each path that differs.
func wantSameTree(t testing.TB, what string, got, want map[string]node) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if g, ok := got[name]; !ok {
			t.Errorf("%s: %q is missing", what, name)
		} else if g != want[name] {
			t.Errorf("%s: %q is\n%+v, want\n%+v", what, name, g, want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: there is a new %q", what, name)
		}
	}
}

// makeCanary makes a tree that shows when somebody writes to it or reads it.
func makeCanary(t testing.TB, dir string) {
	t.Helper()
	old := time.Unix(1e9, 0)
	must(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o751))
	for name, mode := range map[string]fs.FileMode{"secret": 0o640, "sub/secret": 0o604} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte("the canary's secret"), mode), os.Chmod(path, mode),
			// accessed before it was changed: relatime notes the next access
			os.Chtimes(path, old, old.Add(time.Hour))); err != nil {
			t.Fatal(err)
		}
	}
	must(t, errors.Join(os.Symlink("secret", filepath.Join(dir, "link")), os.Chtimes(dir, old, old)))
}

// describeNode is the short form that the corpus uses.
func describeNode(n node) string {
	switch {
	case n.mode.Type() == fs.ModeSymlink:
		return "-> " + n.content
	case n.mode.IsDir():
		return fmt.Sprintf("d%04o", n.mode&^fs.ModeDir)
	}
	return fmt.Sprintf("%04o %s", n.mode, n.content)
}

// wantHarmless fails unless the tree at dir is only data, its own, and leads nowhere else.
func wantHarmless(t testing.TB, dir string, nodes, canary map[string]node) {
	t.Helper()
	for name, n := range nodes {
		if n.mode&^(fs.ModePerm|fs.ModeDir|fs.ModeSymlink) != 0 || n.capability != "" {
			t.Errorf("%q is more than data: %v, capability %q", name, n.mode, n.capability)
		}
		if end, err := filepath.EvalSymlinks(filepath.Join(dir, name)); err == nil && end != dir &&
			!strings.HasPrefix(end, dir+"/") {
			t.Errorf("%q leads to %s", name, end)
		}
		for _, c := range canary {
			if n.inode == c.inode || c.mode.IsRegular() && c.content != "" && strings.Contains(n.content, c.content) {
				t.Errorf("%q is a file from outside", name)
			}
		}
	}
}

// description returns the text of an error answer.
func description(t testing.TB, a answer) string {
	t.Helper()
	var body struct{ Error struct{ Description string } }
	if err := json.Unmarshal([]byte(a.body), &body); err != nil {
		t.Fatalf("body %q: %v", a.body, err)
	}
	return body.Error.Description
}

func TestHostileArchivesLeaveNothingBehind(t *testing.T) {
	t.Parallel()
	engine, d := start(t, func(c *config) {
		c.fetchAllow, c.maxBindBytes, c.maxBindFiles = loopback, corpusBytes, corpusEntries
	})
	neighbour := filepath.Join(d.binds, "neighbour")
	d.quoted = neighbour // by some archives
	d.do(t, "POST", "/service", createBodyJSON("neighbour", "")).want(t, 201)
	makeCanary(t, neighbour)
	rows := hostileArchives(neighbour)
	archives := map[string][]byte{}
	for i, row := range rows {
		archives[fmt.Sprint("/", i)] = row.archive
	}
	url := serveArchives(t, archives)
	everything := func() map[string]node {
		nodes := readTree(t, filepath.Dir(d.binds), filepath.Join(d.binds, "svc"))
		// where the service's directory comes and goes
		for _, name := range []string{"binds", "binds/" + recordDir, "binds/" + markDir} {
			n := nodes[name]
			n.mtime = 0
			nodes[name] = n
		}
		return nodes
	}
	before := everything()
	for i, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			defer d.do(t, "DELETE", "/service/svc", "") // one failure is to be one
			a := d.do(t, "POST", "/service", createBodyJSON("svc",
				fmt.Sprintf(`"bind_contents":"%s/%d"`, url, i))).want(t, row.status)
			if row.status == 201 {
				dir := filepath.Join(d.binds, "svc")
				nodes := readTree(t, dir, "")
				wantHarmless(t, dir, nodes, before)
				delete(nodes, ".")
				got := tree{}
				for name, n := range nodes {
					got[name] = describeNode(n)
				}
				if !maps.Equal(got, row.tree) {
					t.Errorf("it arrived as %q, want %q", got, row.tree)
				}
				d.do(t, "DELETE", "/service/svc", "").want(t, 204)
			} else {
				text := description(t, a)
				if !strings.HasPrefix(text, "bind_contents: ") || len(text) > 8<<10 {
					t.Errorf("the error is %.200q, of %d bytes", text, len(text))
				}
				if quoted := strconv.Quote(row.entry); row.entry != "" &&
					!strings.Contains(text, "entry "+quoted[:len(quoted)-1]) {
					t.Errorf("the error is %.200q, want the entry %s in it", text, quoted)
				}
			}
			wantSameTree(t, "the host", everything(), before)
			if _, err := os.Lstat(filepath.Join(d.binds, "svc")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a bind directory is left: %v", err)
			}
			if names := engine.names(); !slices.Equal(names, []string{"neighbour"}) {
				t.Errorf("there are the containers %q", names)
			}
			if tags := engine.imageTags(); !slices.Equal(tags, []string{"img:1"}) {
				t.Errorf("there are the images %q", tags)
			}
		})
	}
	if log := d.log.String(); strings.Contains(log, "level=ERROR") {
		t.Errorf("an archive made the daemon fail:\n%s", log)
	}
}

// goodArchive has of everything that an archive may have.
func goodArchive(t testing.TB) []byte {
	var b bytes.Buffer
	zipped := gzip.NewWriter(&b)
	w := tar.NewWriter(zipped)
	when := time.Unix(1_700_000_000, 123_456_789)
	add := func(h tar.Header, body string) {
		h.Size, h.Format = int64(len(body)), tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = when
		}
		must(t, w.WriteHeader(&h))
		io.WriteString(w, body)
		when = when.Add(-time.Hour)
	}
	zipped.Write(tarOf(global("comment=0123456789abcdef"))) // as git archive begins
	add(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o750, Uid: 1000, Gid: 1001}, "")
	add(tar.Header{Typeflag: tar.TypeDir, Name: "empty/", Mode: 0o755}, "")
	add(tar.Header{Typeflag: tar.TypeDir, Name: "leer ü/日本語/🎮/", Mode: 0o711, Uid: 1000, Gid: 1001},
		"")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "leer ü/日本語/🎮/Größe\tu\u0308\n.txt", Mode: 0o644,
		Uid: 1000, Gid: 1001}, "grün")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bytes \xff\xfe \\ * ? \"'", Mode: 0o600}, "x")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./bin/run.sh", Mode: 0o755, Uid: math.MaxInt32,
		Gid: math.MaxInt32}, "#!/bin/sh\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "...", Mode: 0o644}, "dots")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "..a/b..", Mode: 0o644}, "dots")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "-rf", Mode: 0o644}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("deep/", 40) + strings.Repeat("n", 255),
		Mode: 0o644}, "deep")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "unwritable/file", Mode: 0o000, Uid: 7}, "unreadable")
	add(tar.Header{Typeflag: tar.TypeDir, Name: "unwritable", Mode: 0o555, Uid: 7}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "unwritable/later", Mode: 0o4, Uid: 7},
		"in a directory without the right to write")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "odd", Mode: 0o517}, strings.Repeat("0123456789", 50_000))
	add(tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "odd", Mode: 0o517}, "")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "deep/hard", Linkname: "./bin/run.sh", Mode: 0o755,
		Uid: math.MaxInt32, Gid: math.MaxInt32}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "latest", Linkname: "bin/run.sh", Mode: 0o777, Uid: 1000,
		Gid: 1000}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "deep/deep/up", Linkname: "../../bin//./run.sh",
		Mode: 0o777}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "deep/root", Linkname: "..", Mode: 0o777}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "dangling", Linkname: "not/there/ü", Mode: 0o777}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "dir", Linkname: "empty/", Mode: 0o777}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "replaced", Mode: 0o777, Uid: 1}, "first, and longer")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "kept", Linkname: "replaced"}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "replaced", Mode: 0o640, Uid: 2}, "second")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "link or file", Mode: 0o640}, "file")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "link or file", Linkname: "odd", Mode: 0o777}, "")
	for year, name := range map[int]string{-5000: "before all time", 1: "first", 1600: "old", 2262: "wraps",
		2300: "far", 9999: "too far"} {
		add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644,
			ModTime: time.Date(year, 6, 1, 0, 0, 0, 5e8, time.UTC)}, "")
	}
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "bin", Mode: 0o777, Uid: 3}, "")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "bin/link", Linkname: "link"}, "")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "odd", Linkname: "odd"}, "")
	add(tar.Header{Typeflag: tar.TypeDir, Name: "gives way", Mode: 0o755}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "gives way", Mode: 0o644}, "to a file")
	add(tar.Header{Typeflag: 'D', Name: "dumped/", Mode: 0o750, Uid: 4}, "Yfile\x00\x00")
	w.Flush()
	zipped.Write(tarOf(entry{name: "label", kind: 'V'}, entry{name: "like a file/", mode: 0o751, uid: 5}))
	must(t, errors.Join(w.Close(), zipped.Close()))
	return append(b.Bytes(), make([]byte, 999)...)
}

// comparableTree leaves out what tar and the daemon need not have in common: what the clock
// gave, and the times of what is no file.
func comparableTree(nodes map[string]node) map[string]node {
	for name, n := range nodes {
		n.atime, n.inode = 0, 0
		if !n.mode.IsRegular() {
			n.mtime = 0
		}
		nodes[name] = n
	}
	return nodes
}

func TestGoodArchiveArrivesAsTarLaysItOut(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away, and look at what nobody may read")
	}
	archive := goodArchive(t)
	// on the daemon's file system, which has its own limits of times
	dir := filepath.Join(tempInMemory(t), "reference")
	must(t, os.Mkdir(dir, 0o755))
	reference := exec.Command("sh", "-c", `umask 022 && exec tar --numeric-owner -xzf - -C "$0"`, dir)
	reference.Stdin = bytes.NewReader(archive)
	if output, err := reference.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, output)
	}
	want := comparableTree(readTree(t, dir, ""))
	if len(want) < 60 {
		t.Fatalf("the archive has only %d paths", len(want))
	}
	_, d := start(t, func(c *config) { c.fetchAllow = loopback })
	contents := fmt.Sprintf(`"bind_contents":"%s/a"`, serveArchives(t, map[string][]byte{"/a": archive}))

	for _, user := range []string{"", "app", "app:1000"} {
		t.Run("user "+user, func(t *testing.T) {
			d.do(t, "POST", "/service", createBodyJSON("svc", contents+fmt.Sprintf(`,"user":%q`, user))).want(t, 201)
			wantSameTree(t, "the bind directory", comparableTree(readTree(t, filepath.Join(d.binds, "svc"), "")), want)
			d.do(t, "DELETE", "/service/svc", "").want(t, 204)
		})
	}
	for user, o := range map[string]owner{"1234": {1234, 0}, "1234:5678": {1234, 5678}, "1234:app": {1234, 0},
		"0:0": {0, 0}} {
		t.Run("numeric user "+user, func(t *testing.T) {
			owned := maps.Clone(want)
			for name, n := range owned {
				n.uid, n.gid = uint32(o.uid), uint32(o.gid)
				owned[name] = n
			}
			d.do(t, "POST", "/service", createBodyJSON("svc", contents+fmt.Sprintf(`,"user":%q`, user))).want(t, 201)
			wantSameTree(t, "the bind directory", comparableTree(readTree(t, filepath.Join(d.binds, "svc"), "")),
				owned)
			d.do(t, "DELETE", "/service/svc", "").want(t, 204)
		})
	}
}

// An archive whose stream is whole, but which is not, must not arrive as a smaller tree.
func TestArchiveCutOffAnywhereIsRefused(t *testing.T) {
	t.Parallel()
	plain := slices.Concat(tarOf(global("comment=x"), dir("d"), file("d/a", "12 bytes"), pax("path=b"),
		file("x", strings.Repeat("b", 600)),
		entry{name: "././@LongLink", kind: 'L', body: "c\x00"}, file("x", "c"),
		entry{name: "e/", kind: 'D', mode: 0o755, body: "Ya\x00\x00"}, entry{name: "label", kind: 'V', body: "x"},
		pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=s", "GNU.sparse.realsize=3"),
		file("x", "0\n"+strings.Repeat("\x00", 510)),
		symlink("l", "b"), hardLink("h", "b"), file("last", "of 12 bytes")), tarEnd)
	root, limits := openTree(t, t.TempDir()), unpackLimits{bytes: 1 << 20, entries: 100}
	refuses := func(archive []byte) bool {
		err := unpack(bytes.NewReader(archive), root, limits, nil)
		kind, _ := describe(cmp.Or(err, errStalled))
		return kind == kindArchiveRefused
	}
	var zipped bytes.Buffer
	w := gzip.NewWriter(nil)
	for at := range plain {
		if brief() && at%blockSize > 1 && at%37 > 0 {
			continue
		}
		zipped.Reset()
		w.Reset(&zipped)
		w.Write(plain[:at])
		w.Close()
		if !refuses(zipped.Bytes()) {
			t.Errorf("cut off at %d of %d bytes, it is not refused", at, len(plain))
		}
	}
	whole := gzipped(plain)
	for at := range whole {
		if !refuses(whole[:at]) {
			t.Errorf("cut off at %d of %d compressed bytes, it is not refused", at, len(whole))
		}
	}
	if refuses(whole) {
		t.Error("whole, it is refused")
	}
}

func TestWhatIsNotATarGzIsNamed(t *testing.T) {
	t.Parallel()
	plain := slices.Concat(tarOf(file("f", "x")), tarEnd)
	v7 := slices.Concat(plain[:257], make([]byte, 255)) // without the magic "ustar"
	sealHeader(v7)
	for _, test := range []struct{ name, archive, want string }{
		{"nothing", "", "empty"},
		{"HTML", "<!doctype html>Sign in", "HTML"},
		{"HTML in capitals, behind spaces", " \r\n<HTML lang=en>", "HTML"},
		{"HTML behind a byte order mark", "\ufeff<html><body>", "HTML"},
		{"JSON", `{"error":"not found"}`, "text"},
		{"zip", "PK\x03\x04" + string(make([]byte, 30)), "a zip archive"},
		{"zip without a file", "PK\x05\x06" + string(make([]byte, 18)), "a zip archive"},
		{"xz", "\xfd7zXZ\x00" + string(make([]byte, 30)), "xz"},
		{"zstd", "\x28\xb5\x2f\xfd" + string(make([]byte, 30)), "zstd"},
		{"bzip2", "BZh91AY&SY", "bzip2"},
		{"tar", string(plain), "a tar archive that is not compressed"},
		{"tar with an extended header", string(tarOf(pax("path=" + strings.Repeat("a", 600)))),
			"a tar archive that is not compressed"},
		{"tar before POSIX", string(slices.Concat(v7, tarEnd)), "a tar archive that is not compressed"},
		{"tar without an entry", string(make([]byte, 10240)), "a tar archive that is not compressed"},
		{"picture", "\x89PNG\x0d\x0a\x1a\x0a", "image/png"},
		{"gzip of nothing", string(gzipped()),
			"the content of the gzip stream is not a tar archive: it is empty"},
		{"gzip of text", string(gzipped([]byte("hello"))),
			"the content of the gzip stream is not a tar archive: it is text"},
		{"gzip of HTML", string(gzipped([]byte("<!doctype html>" + strings.Repeat("Sign in", 100)))),
			"the content of the gzip stream is not a tar archive: it is HTML"},
		{"gzip twice", string(gzipped(gzipped(plain))),
			"the content of the gzip stream is not a tar archive: it is gzip"},
		{"something behind it", string(gzipped(plain)) + "garbage", "something other than zeros follows"},
		{"cut off", string(gzipped(plain[:700])), "cut off"},
		{"cut off in the gzip stream", string(gzipped(plain)[:30]), "cut off"},
		{"path that stays inside", string(tgz(file("a/../x", ""))), "contains '..'"},
	} {
		err := unpack(strings.NewReader(test.archive), openTree(t, t.TempDir()),
			unpackLimits{bytes: 1 << 20, entries: 10}, nil)
		if err == nil {
			t.Errorf("%s: it was unpacked", test.name)
		} else if kind, text := describe(err); kind != kindArchiveRefused || !strings.Contains(text, test.want) {
			t.Errorf("%s: %v %q, want %q in it", test.name, kind, text, test.want)
		}
	}
}

func TestOwnersOutOfRangeMatterOnlyWhereTheyAreUsed(t *testing.T) {
	t.Parallel()
	nobody := int64(1<<32 - 2) // of NFS and macOS
	archive := tgz(entry{name: "./", kind: '5', mode: 0o755, uid: nobody},
		entry{name: "a", uid: nobody, gid: -1}, entry{name: "l", kind: '2', link: "a", gid: nobody})
	us := &owner{os.Getuid(), os.Getgid()}
	if err := unpack(bytes.NewReader(archive), openTree(t, t.TempDir()),
		unpackLimits{bytes: 1 << 20, entries: 10}, us); err != nil {
		t.Error(err)
	}
}

// A stream that is much larger than what it takes to unpack it: TotalAlloc counts all
// that is ever allocated, so nothing of this can have been in memory at once.
func TestUnpackingNeedsNoMemoryForContents(t *testing.T) { // not parallel: it measures the process
	const megabytes = 200
	bound := uint64(1 << 20)
	if raceDetector() { // with which sync.Pool forgets
		bound *= 4
	}
	zeros := make([]byte, 1<<20)
	for name, c := range map[string]struct{ head, member []byte }{
		"one file":            {entry{name: "a", size: megabytes << 20}.bytes(), zeros},
		"a file many times":   {nil, file("a", string(zeros)).bytes()},
		"padding behind them": {slices.Concat(tarOf(file("a", "")), tarEnd), zeros},
	} {
		t.Run(name, func(t *testing.T) {
			root, err := os.OpenRoot(t.TempDir())
			must(t, err)
			defer root.Close()
			var member bytes.Buffer
			w, _ := gzip.NewWriterLevel(&member, gzip.NoCompression) // it is the unpacking that this is about
			w.Write(c.member)
			w.Close()
			parts := []io.Reader{bytes.NewReader(gzipped(c.head))}
			for range megabytes {
				parts = append(parts, bytes.NewReader(member.Bytes()))
			}
			parts = append(parts, bytes.NewReader(gzipped(tarEnd)))
			stream := bufio.NewReader(io.MultiReader(parts...))
			allocated := allocatedBy(func() {
				err = unpack(stream, root, unpackLimits{bytes: math.MaxInt64, entries: math.MaxInt64}, nil)
			})
			must(t, err)
			if allocated > bound {
				t.Errorf("it allocated %d bytes, want at most %d", allocated, bound)
			}
		})
	}
}

// FuzzUnpack unpacks any bytes, or any tar file with its headers' checksums put right,
// which no fuzzer would guess. Memory is measured as all that unpack ever allocates.
func FuzzUnpack(f *testing.F) {
	limits := unpackLimits{bytes: 64 << 10, entries: 32}
	const maxSeed, maxAllocated = 16 << 10, 4 << 20
	outer, err := filepath.EvalSymlinks(f.TempDir())
	must(f, err)
	makeCanary(f, filepath.Join(outer, "neighbour"))
	staging := filepath.Join(outer, "staging")
	for _, row := range hostileArchives(filepath.Join(outer, "neighbour")) {
		if len(row.archive) <= maxSeed {
			f.Add(row.archive, true)
		}
		if unzipped, err := gzip.NewReader(bytes.NewReader(row.archive)); err == nil {
			if plain, _ := io.ReadAll(io.LimitReader(unzipped, maxSeed+1)); len(plain) <= maxSeed {
				f.Add(plain, false)
			}
		}
	}
	f.Add(goodArchive(f), true)
	outside := func(t *testing.T) map[string]node {
		nodes := readTree(t, outer, staging)
		root := nodes["."]
		root.mtime = 0 // staging comes and goes
		nodes["."] = root
		return nodes
	}
	var before map[string]node
	f.Fuzz(func(t *testing.T, archive []byte, zipped bool) {
		if before == nil {
			before = outside(t)
		}
		if !zipped {
			archive = gzipped(withChecksums(archive))
		}
		must(t, os.Mkdir(staging, 0o700))
		defer os.RemoveAll(staging)
		root, err := os.OpenRoot(staging)
		must(t, err)
		defer root.Close()
		allocated := allocatedBy(func() { err = unpack(bytes.NewReader(archive), root, limits, nil) })
		if allocated > maxAllocated {
			t.Errorf("it allocated %d bytes, want at most %d", allocated, maxAllocated)
		}
		if err != nil {
			if kind, text := describe(err); kind != kindArchiveRefused && kind != kindTooLarge || len(text) > 16<<10 {
				t.Errorf("%v, %d bytes of text: %v", kind, len(text), err)
			}
		}
		nodes := readTree(t, staging, "")
		wantHarmless(t, staging, nodes, before)
		size, most := int64(0), limits.entries+maxEntryPath/2+1 // the last entry may have a long path
		for name, n := range nodes {
			if n.twin == name {
				size += int64(len(n.content))
			}
		}
		if size > limits.bytes || int64(len(nodes)) > most {
			t.Errorf("it made %d files and directories of %d bytes", len(nodes), size)
		}
		wantSameTree(t, "the host", outside(t), before)
	})
}

// Headers before an entry may claim gigabytes; they are kept in memory.
func TestHeadersOfAnEntryAreBounded(t *testing.T) {
	t.Parallel()
	for _, kind := range []byte{'x', 'L', 'K'} {
		head := entry{name: "h", kind: kind, size: 1 << 30}.bytes()
		for name, check := range map[string]func(io.Reader) error{
			"an image": checkTar,
			"an archive": func(r io.Reader) error {
				text, err := io.ReadAll(r)
				must(t, err)
				return unpack(bytes.NewReader(gzipped(text)), openTree(t, t.TempDir()), unpackLimits{1 << 40, 10}, nil)
			},
		} {
			err := check(bytes.NewReader(append(head, make([]byte, 5<<20)...)))
			if err == nil || !strings.Contains(err.Error(), "more than 4 MiB of headers") {
				t.Errorf("%s with a header of type %c: %v", name, kind, err)
			}
		}
	}
}

func TestArchiveOfExactlyTheLimitIsUnpacked(t *testing.T) {
	t.Parallel()
	plain := archiveOf(file("a", strings.Repeat("x", 4096)))
	for limit, whole := range map[int]bool{len(plain): true, len(plain) - 1: false} {
		limits := unpackLimits{int64(limit), 10}
		err := unpack(bytes.NewReader(gzipped(plain)), openTree(t, t.TempDir()), limits, nil)
		if (err == nil) != whole {
			t.Errorf("%d of %d bytes: %v", limit, len(plain), err)
		}
	}
}
