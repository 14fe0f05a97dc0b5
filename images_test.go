package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/bzip2"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// What is not one whole, plain archive is refused, and the engine does not see it.
func TestUploadThatIsNoWholeTarLeavesNoImage(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	whole := wholeTar()
	flipped := []byte(whole)
	flipped[0] ^= 1 // the header's checksum is wrong now
	type upload struct{ body, says string }
	uploads := map[string]upload{
		"empty": {"", ""}, "text": {"not a tar", ""}, "a block of text": {strings.Repeat("x", 512), ""},
		"JSON": {createBodyJSON("web", ""), ""}, "only the end mark": {strings.Repeat("\x00", 1024), ""},
		"no end mark": {whole[:1024], ""}, "half an end mark": {whole[:1024+512], ""},
		"cut in the header": {whole[:300], ""}, "cut in the file": {whole[:514], ""},
		"cut in the padding": {whole[:600], ""}, "wrong checksum": {string(flipped), ""},
		"gzip": {"\x1f\x8b\x08\x00" + strings.Repeat("\x00", 600), "gzip"},

		"another archive behind it": {whole + whole, ""}, "a byte behind it": {whole + "\x01", ""},
		"zeros and a byte behind it":          {whole + strings.Repeat("\x00", 10_000) + "x", ""},
		"an archive after one block of zeros": {whole[:1024] + strings.Repeat("\x00", 512) + whole, ""},
		"more zeros than any tar writes":      {whole + strings.Repeat("\x00", maxPadding+1), ""},
		"a file of holes":                     {fileOfHoles(1 << 40), "sparse"},
	}
	for name, magic := range map[string]string{
		"gzip": "\x1f\x8b\x08", "bzip2": "BZh9", "xz": "\xfd7zXZ", "zstd": "\x28\xb5\x2f\xfd",
		"lz4": "\x04\x22\x4d\x18", "old lz4": "\x02\x21\x4c\x18",
		"skippable frame of zstd or lz4": "\x50\x2a\x4d\x18", "the last such": "\x5f\x2a\x4d\x18",
	} {
		uploads["a tar archive that begins as "+name] = upload{polyglot(magic), "compressed"}
	}
	for _, kind := range "VMDNZ7" + "123456" { // kinds that the engine cannot unpack, and kinds without content
		text := []byte(whole)
		text[156] = byte(kind)
		uploads["an entry of type "+string(kind)] = upload{string(withChecksums(text)), "hello"}
	}
	asked := len(e.calls())
	for name, upload := range uploads {
		if a := d.do(t, "POST", "/docker/image", upload.body); a.status != 400 ||
			!strings.Contains(a.body, upload.says) {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	e.wantAskedNothing(t, asked)
	d.do(t, "POST", "/docker/image", whole).want(t, 201)
	d.do(t, "POST", "/docker/image", whole+strings.Repeat("\x00", maxPadding)).want(t, 201)
}

func TestUploadThatIsTooLargeLeavesNoImage(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.maxImageBytes = int64(len(wholeTar())) })
	d.do(t, "POST", "/docker/image", wholeTar()+"\x00").want(t, 413, "2048")
	r := d.request(t, "POST", "/docker/image", io.MultiReader(strings.NewReader(wholeTar()),
		strings.NewReader("\x00")))
	r.ContentLength = -1
	d.send(t, r).want(t, 413, "2048")
	e.wantImages(t)
	d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201)
}

// After an upload, whatever became of it, its connection is good for more, or closed.
func TestRequestAfterAnUpload(t *testing.T) {
	t.Parallel()
	_, d := start(t, nil)
	for range 20 { // it depends on what net/http is at
		for upload, status := range map[string]int{wholeTar(): 201, "": 400, strings.Repeat("x", 512): 400,
			wholeTar()[:700]: 400} {
			d.do(t, "POST", "/docker/image", upload).want(t, status)
			d.do(t, "GET", "/service", "").want(t, 200)
		}
	}
}

func TestMissingImageIsPulledWithTheClientsCredentials(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addRemote("example.com/team/app:2", true)
	d := startDaemon(t, e.host(), nil)
	credentials := make(chan http.Header, 100)
	e.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("X-Registry-Auth") != "" || strings.HasSuffix(r.URL.Path, "/images/create") {
			credentials <- r.Header
		}
		return false
	})
	r := d.request(t, "POST", "/service", strings.NewReader(createBodyJSON("web",
		`"image":"example.com/team/app:2"`)))
	r.Header.Set("X-Registry-Auth", "eyJ1Ijoi")
	d.send(t, r).want(t, 201)
	if got := <-credentials; got.Get("X-Registry-Auth") != "eyJ1Ijoi" {
		t.Errorf("the pull carried %q", got)
	}
	if len(credentials) > 0 {
		t.Error("more than the pull carried the credentials")
	}
	calls := len(e.calls())
	d.do(t, "POST", "/service", createBodyJSON("web2", `"image":"example.com/team/app:2"`)).want(t, 201)
	for _, call := range e.calls()[calls:] {
		if strings.Contains(call, "fromImage") {
			t.Errorf("an image that is there was pulled: %s", call)
		}
	}
}

func TestFailedPullLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		engineStatus int
		engineBody   string
		status       int
		text         string
	}{
		{200, `{"status":"Pulling"}` + "\n" + `{"errorDetail":{"message":"disk full"},"error":"disk full"}` + "\n",
			502, "disk full"},
		{200, `{"error":"manifest broken"}{"status":"Done"}`, 502, "manifest broken"},
		{200, `{"status":"Pulling"}` + "\n" + `{"stat`, 502, ""},
		{200, `<html>`, 502, ""},
		{404, `{"message":"pull access denied"}`, 404, "pull access denied"},
		{500, `{"message":"no such host"}`, 502, "no such host"},
		{401, `{"message":"unauthorized"}`, 502, "unauthorized"},
		{403, `{"message":"denied"}`, 502, "denied"},
		// A registry that lies: the image is not there afterwards.
		{200, `{"status":"Done"}`, 404, "img:1"},
	} {
		e := newFakeEngine(t)
		d := startDaemon(t, e.host(), nil)
		before := state(t, e, d)
		e.answerWith("/images/create", test.engineStatus, test.engineBody)
		d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, test.status, test.text)
		if after := state(t, e, d); after != before {
			t.Errorf("%d %s left %s", test.engineStatus, test.engineBody, after)
		}
	}
}

func TestPullThatFindsNothingOrOnlyAPartLeavesNothing(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	before := state(t, e, d)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 404, "cannot pull the image: engine: ",
		"not found")
	e.addRemote("img:1", false)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 502, "engine: "+e.dialect.noSuchLayer)
	wantState(t, e, d, before)
	e.addRemote("img:1", true)
	d.do(t, "POST", "/service", createBodyJSON("web", "")).want(t, 201)
}

// polyglot returns a tar archive whose first entry has a name that begins as a compressed stream
// does. To the engine it is one.
func polyglot(magic string) string {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	w.WriteHeader(&tar.Header{Name: magic + "\x04", Mode: 0o755, Size: 5, Format: tar.FormatGNU})
	w.Write([]byte("world"))
	w.Close()
	return archive.String()
}

// fileOfHoles returns an archive of a few blocks with a file of any size that holds nothing, as
// "tar --sparse --format=posix" writes it.
func fileOfHoles(size int64) string {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	// Go's writer refuses the records for this; those that it takes have names of the same length.
	w.WriteHeader(&tar.Header{Name: "holes", Mode: 0o644, Size: 512, Format: tar.FormatPAX,
		PAXRecords: map[string]string{
			"ABC.sparse.major": "1", "ABC.sparse.minor": "0", "ABC.sparse.realsize": strconv.FormatInt(size, 10)}})
	w.Write([]byte("0\n" + strings.Repeat("\x00", 510)))
	w.Close()
	return strings.ReplaceAll(archive.String(), "ABC.sparse", "GNU.sparse")
}

// GNU tar takes some records of a global header for those of all entries, Go none.
func TestGlobalHeaderThatChangesEntriesIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		entries []entry
		text    string // of the error, if there is one
	}{
		"git's comment":           {[]entry{global("comment=0123"), file("a", "x")}, ""},
		"a size":                  {[]entry{global("size=512"), file("a", ""), file("b", "")}, "global header"},
		"a name":                  {[]entry{global("path=other"), file("a", "x")}, "global header"},
		"a comment and an owner":  {[]entry{global("comment=0123", "uid=5"), file("a", "x")}, "global header"},
		"nothing but the comment": {[]entry{global("comment=0123")}, "no entries"},
	} {
		err := checkTar(bytes.NewReader(archiveOf(test.entries...)))
		if (err == nil) != (test.text == "") || err != nil && !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Each of these is one tree for archive/tar and another for GNU tar or bsdtar.
func TestArchiveThatTarProgramsReadDifferentlyIsRefused(t *testing.T) {
	t.Parallel()
	inner := string(tarOf(file("evil", "EVIL")))
	rawSize := func(field string) []byte {
		block := file("file", "").bytes()
		copy(block[124:136], field)
		sealHeader(block)
		return block
	}
	negative := pax("path=a").bytes()
	copy(negative[124:136], "-0000001000\x00")
	sealHeader(negative[:512])
	gnuPrefix := file("file", "").bytes()
	copy(gnuPrefix[257:], "ustar  \x00")
	copy(gnuPrefix[345:], "directory")
	sealHeader(gnuPrefix)
	gnuTimes := file("file", "").bytes() // as tar --listed-incremental writes those before 1970
	copy(gnuTimes[257:], "ustar  \x00")
	tarNumber(gnuTimes[345:357], -1)
	tarNumber(gnuTimes[357:369], 1<<40)
	sealHeader(gnuTimes)
	oldFile := file("foo/", inner).bytes() // whose type is NUL
	oldFile[156] = 0
	sealHeader(oldFile[:512])
	long := func(kind byte, name string) entry {
		return entry{name: "././@LongLink", kind: kind, body: name + "\x00"}
	}
	at := func(block []byte, texts map[int]string) []byte {
		for offset, text := range texts {
			copy(block[offset:], text)
		}
		sealHeader(block[:512])
		return block
	}
	record := func(text string) entry { return entry{name: "pax", kind: 'x', body: text} }
	for name, archive := range map[string][]byte{
		"a blank ahead of a path's key": tarOf(pax(" path=b"), file("n", "")),
		"a tab ahead of a size's key":   tarOf(pax("\tsize=1024"), file("n", ""), file("evil", "EVIL")),
		"a blank in a second record": tarOf(pax("comment=c", " size=1024"), file("n", ""),
			file("evil", "EVIL")),
		"a sign ahead of a record":         tarOf(record("+11 path=a\n"), file("n", "")),
		"a long name of no length":         tarOf(entry{name: "././@LongLink", kind: 'L'}, file("n", "")),
		"an empty long name":               tarOf(long('L', ""), file("n", "")),
		"an empty long link":               tarOf(long('K', ""), symlink("n", "m")),
		"a long name that starts with NUL": tarOf(long('L', "\x00a"), file("n", "")),
		"a size of blanks":                 rawSize(strings.Repeat(" ", 12)),
		"an old file, by an extended header": slices.Concat(pax("path=foo").bytes(),
			oldFile),
		"an old file, by a long name": slices.Concat(long('L', "foo").bytes(),
			oldFile),
		"a prefix that is cut off in star's format": at(file("n", "").bytes(),
			map[int]string{345: strings.Repeat("p", 131) + "00000000000", 508: "tar\x00"}),
		"a prefix in the oldest format": at(file("n", "").bytes(),
			map[int]string{257: string(make([]byte, 8)), 345: "prefix"}),
		"a prefix behind half a magic number": at(file("n", "").bytes(),
			map[int]string{257: "ustar 00", 345: "prefix"}),
		"a file with the size of a sparse one": at(file("n", "x").bytes(),
			map[int]string{257: "ustar  \x00", 483: "00000001000"}),
		"a file with the map of a sparse one": at(file("n", "x").bytes(),
			map[int]string{257: "ustar  \x00", 386: "00000001000"}),
		"a sparse file of Solaris":       tarOf(pax("SUN.holesdata= 0 4"), file("n", "EVIL")),
		"a file with a directory's name": tarOf(file("foo/", "")),
		"one with content":               tarOf(file("foo/", inner)),
		"one by an extended header":      tarOf(pax("path=foo/"), file("foo", inner)),
		"one by a long name":             tarOf(long('L', "foo/"), file("foo", inner)),
		"one of the oldest format":       oldFile,
		"a global header behind an extended one": tarOf(pax("size=1024"), global("comment=c"), file("n", ""),
			file("evil", "EVIL")),
		"a global header behind a long name": tarOf(long('L', "other"), global("comment=c"),
			file("n", "")),
		"a global header behind a long link": tarOf(long('K', "other"), global("comment=c"),
			symlink("n", "m")),
		"two extended headers": tarOf(pax("size=1024"), pax("comment=c"), file("n", ""),
			file("evil", "EVIL")),
		"an extended header and a long name":           tarOf(pax("path=a"), long('L', "b"), file("n", "")),
		"a long name and an extended header's":         tarOf(long('L', "b"), pax("path=a"), file("n", "")),
		"an extended header of negative size":          slices.Concat(negative, tarOf(file("n", ""))),
		"two long names":                               tarOf(long('L', "a"), long('L', "b"), file("n", "")),
		"an extended header at the end":                tarOf(file("n", ""), pax("path=a")),
		"a size with a plus":                           tarOf(pax("size=+1024"), file("n", inner)),
		"a size with a minus":                          tarOf(pax("size=-0"), file("n", "")),
		"a size with a space":                          tarOf(pax("size= 1024"), file("n", inner)),
		"a size with a point":                          tarOf(pax("size=1024.0"), file("n", inner)),
		"a hexadecimal size":                           tarOf(pax("size=0x400"), file("n", inner)),
		"an empty size":                                tarOf(pax("size="), file("n", inner)),
		"an empty name":                                tarOf(pax("path="), file("n", "")),
		"an empty link":                                tarOf(pax("linkpath="), symlink("n", "m")),
		"a NUL ahead of a header's size":               slices.Concat(rawSize("\x00\x000000002000"), []byte(inner)),
		"a NUL within spaces ahead of a header's size": slices.Concat(rawSize(" \x00 000002000"), []byte(inner)),
		"a prefix in GNU's format":                     gnuPrefix,
		"a sparse file of star":                        tarOf(pax("SCHILY.realsize=1048576"), file("n", "")),
		"a name that leads up":                         tarOf(file("../n", "")),
		"a name that leads up and down":                tarOf(file("d/../n", "")),
		"no name":                                      tarOf(file("", "")),
		"a deletion":                                   tarOf(dir("d"), file("d/.wh.n", "")),
		"a deletion of overlayfs":                      tarOf(entry{name: "n", kind: '3'}),
		"a deletion of all":                            tarOf(file(".wh..wh..opq", "")),
		"an owner of 33 bits":                          tarOf(pax("uid=4294967296"), file("n", "")),
		"a group of -1":                                tarOf(pax("gid=-1"), file("n", "")),
		"an owner that means unchanged":                tarOf(pax("uid=4294967295"), file("n", "")),
	} {
		err := checkTar(bytes.NewReader(slices.Concat(tarOf(file("first", "x")), archive, tarEnd)))
		if kind, _ := describeOrNone(err); kind != kindArchiveRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, archive := range map[string][]byte{
		"a directory of the oldest format":   tarOf(dir("foo/")),
		"a long name and a long link":        tarOf(long('L', "a"), long('K', "b"), symlink("n", "m")),
		"a long name and an extended header": tarOf(long('L', "a"), pax("mtime=1.5"), file("n", "x")),
		"an extended header for each":        tarOf(pax("path=a"), file("n", "x"), pax("size=3"), file("m", "abc")),
		"global headers":                     tarOf(global("comment=c"), global("comment=d"), file("n", "x")),
		"a size padded with spaces":          slices.Concat(rawSize("       2000 "), []byte(inner)),
		"times in GNU's format":              gnuTimes,
		"names of two dots and more":         tarOf(dir("..d"), file("..d/...", ""), file("a.wh.b", "")),
		"the greatest owner":                 tarOf(pax("uid=4294967294"), file("n", "x")),
		"no size":                            rawSize(strings.Repeat("\x00", 12)),
		"a size in base 256": slices.Concat(rawSize("\x80"+strings.Repeat("\x00", 9)+"\x04\x00"),
			[]byte(inner)),
	} {
		if err := checkTar(bytes.NewReader(append(archive, tarEnd...))); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// describeOrNone is describe for what may be no error.
func describeOrNone(err error) (kind, string) {
	if err == nil {
		return kind{}, ""
	}
	return describe(err)
}

func TestSavedImageIsRefusedWithAdvice(t *testing.T) {
	t.Parallel()
	_, d := start(t, nil)
	manifest := file("manifest.json", `[{"Config":"c.json","Layers":["0123/layer.tar"]}]`)
	for name, entries := range map[string][]entry{
		"of docker save": {dir("0123/"), file("0123/layer.tar", ""), file("c.json", "{}"),
			manifest},
		"of docker save, manifest first": {manifest, file("0123/layer.tar", "")},
		"of docker save since engine 25": {dir("blobs/"), dir("blobs/sha256/"), file("blobs/sha256/0123", "{}"),
			manifest},
		"of tar, of what docker save wrote": {dir("./"), file("./manifest.json", "[]"),
			symlink("./0123/layer.tar", "../4567/layer.tar")},
		"of crane":  {file("sha256:0123", "{}"), file(strings.Repeat("a", 64)+".tar.gz", ""), manifest},
		"of skopeo": {file("version", ""), file(strings.Repeat("a", 64), ""), manifest},
		"an OCI layout": {file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`),
			file("index.json", "{}")},
		"an OCI layout, with absolute names": {file("/index.json", "{}"), file("/oci-layout", "{}")},
		"an OCI layout, its blobs ahead": {file("blobs/sha256/0123", ""), file("index.json", "{}"),
			file("./oci-layout", "{}")},
	} {
		a := d.do(t, "POST", "/docker/image", string(archiveOf(entries...)))
		if a.status != 400 || !strings.Contains(a.body, `"archive_refused"`) ||
			!strings.Contains(a.body, "docker export") {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	root := []entry{manifest, dir("oci-layout/"), file("app/oci-layout", ""), file("app/blobs/x", ""),
		file("a/b/layer.tar", ""), file("layer.tar", ""), file("backup.tar.gz", "")}
	d.do(t, "POST", "/docker/image", string(archiveOf(root...))).want(t, 201)
}

func TestSparseFileOfAnyFormatIsRefused(t *testing.T) {
	t.Parallel()
	sparse := func(extended byte, version string) []byte {
		block := entry{name: "holes", kind: 'S', realSize: 1 << 40}.bytes()
		block[482] = extended
		copy(block[257:], version)
		sealHeader(block)
		return block
	}
	for name, archive := range map[string][]byte{
		"GNU tar's own":                    sparse(0, "ustar  \x00"),
		"one whose map goes on":            append(sparse(1, "ustar  \x00"), make([]byte, 512)...),
		"one that archive/tar cannot read": sparse(0, "ustar\x0000"),
		"POSIX 0.0": tarOf(pax("GNU.sparse.size=1024", "GNU.sparse.numblocks=1",
			"GNU.sparse.offset=0", "GNU.sparse.numbytes=1"), file("holes", "x")),
		"POSIX 0.1": tarOf(pax("GNU.sparse.size=1024", "GNU.sparse.numblocks=1",
			"GNU.sparse.map=0,1"), file("holes", "x")),
		"POSIX 1.0": []byte(fileOfHoles(1 << 40)[:2560]),
	} {
		err := checkTar(bytes.NewReader(slices.Concat(tarOf(file("first", "x")), archive, tarEnd)))
		if err == nil || !strings.Contains(err.Error(), `"holes": it is a sparse file`) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// manyEntries is an archive of n entries that are always the same.
func manyEntries(n int, e entry) io.Reader {
	const batch = 1000
	part := bytes.Repeat(e.bytes(), batch)
	return readerFunc(func(p []byte) (int, error) {
		if n == 0 {
			return 0, io.EOF
		}
		if len(part) == 0 {
			part, n = bytes.Repeat(e.bytes(), batch), n-batch
		}
		copied := copy(p, part)
		part = part[copied:]
		return copied, nil
	})
}

func TestArchiveOfTooManyEntriesIsRefused(t *testing.T) {
	if brief() {
		t.Skip("reads 512 MB")
	}
	t.Parallel()
	archive := func(more ...entry) io.Reader {
		return io.MultiReader(io.LimitReader(manyEntries(2*maxImageEntries, dir("a")), maxImageEntries*512),
			bytes.NewReader(archiveOf(more...)))
	}
	if err := checkTar(archive()); err != nil {
		t.Error(err)
	}
	if err := checkTar(archive(file("one", ""))); err == nil ||
		!strings.Contains(err.Error(), `"one": the archive has more than 1000000 entries`) {
		t.Error(err)
	}
}

func TestCheckOfALargeUploadTakesLittleMemory(t *testing.T) {
	// Not parallel: it counts what the process allocates.
	archive := io.MultiReader(io.LimitReader(manyEntries(1<<20, file("a", strings.Repeat("x", 16<<10))),
		1000*(512+16<<10)),
		bytes.NewReader(tarOf(pax("comment="+strings.Repeat("c", 500_000)), file("b", ""))),
		bytes.NewReader(tarEnd))
	var err error
	if got := allocatedBy(func() { err = checkTar(archive) }) >> 20; err != nil || got > 64 {
		t.Errorf("it allocated %d MiB; %v", got, err)
	}
}

// uploadsIn returns what is left of uploads in a bind root: entries, and open files without a name.
func uploadsIn(t *testing.T, binds string) (left []string) {
	t.Helper()
	entries, err := os.ReadDir(binds)
	must(t, err)
	for _, e := range entries {
		if e.Name() != recordDir && e.Name() != markDir {
			left = append(left, e.Name())
		}
	}
	named := func(path string) bool { return !strings.HasSuffix(path, "(deleted)") }
	return append(left, slices.DeleteFunc(openFiles(binds), named)...)
}

func TestUploadLeavesNoFile(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.maxImageBytes = 1 << 20 })
	link := string(archiveOf(hardLink("link", "nothing")))
	for upload, status := range map[string]int{wholeTar(): 201, "": 400, "no tar": 400, wholeTar()[:700]: 400,
		link: 400,
		wholeTar() + strings.Repeat("\x00", 1<<20): 413} {
		d.do(t, "POST", "/docker/image", upload).want(t, status)
	}
	conn := wireDial(t, d)
	io.WriteString(conn, d.head("POST /docker/image")+"Content-Length: 99999\r\n\r\n"+wholeTar())
	waitFor(t, "the upload's file", func() bool { return len(uploadsIn(t, d.binds)) == 1 })
	if names := uploadsIn(t, d.binds); !strings.HasSuffix(names[0], "(deleted)") {
		t.Errorf("during an upload the bind root has %q", names)
	}
	conn.Close()
	waitFor(t, "the file to go", func() bool { return len(uploadsIn(t, d.binds)) == 0 })
	if tags := e.imageTags(); len(tags) != 1 { // of the one whole upload
		t.Errorf("there are the images %q", tags)
	}
}

func TestUploadOnAFullDisk(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("mounts a file system, which takes root")
	}
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) {
		mountTmpfs(t, c.binds, "size=1m")
	})
	large := string(archiveOf(file("large", strings.Repeat("x", 2<<20))))
	d.do(t, "POST", "/docker/image", large).want(t, 507, `"disk_full"`, "the disk is full")
	if countCalls(e.calls(), "fromSrc") > 0 {
		t.Errorf("the engine was asked %q", e.calls())
	}
	for range 3 { // there is room again
		d.do(t, "POST", "/docker/image", string(archiveOf(file("most", strings.Repeat("x", 900<<10))))).want(t, 201)
	}
}

// What an engine on another machine writes cannot be synced from here.
func TestImportThatCannotBeSyncedIsLoggedOnce(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.dataRoot = filepath.Join(e.dataRoot, "missing")
	d := startDaemon(t, e.host(), nil)
	for range 2 {
		d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201)
	}
	if got := strings.Count(d.log.String(), "imports are not synced"); got != 1 {
		t.Errorf("logged %d times:\n%s", got, d.log)
	}
}

// An error that does not say that the engine's directory is elsewhere, such as a lack of descriptors.
func TestImportWhoseSyncIsInDoubtLeavesNoImage(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	loop := filepath.Join(e.dataRoot, "loop")
	must(t, os.Symlink(loop, loop))
	e.dataRoot = loop
	d := startDaemon(t, e.host(), nil)
	d.do(t, "POST", "/docker/image", wholeTar()).want(t, 500)
	if tags := e.imageTags(); len(tags) > 0 {
		t.Errorf("there are the images %q", tags)
	}
}

// Whatever an engine has made, by the name that it was given, of an import that then fails, goes.
func TestImportThatTheEngineFailsLeavesNoImage(t *testing.T) {
	t.Parallel()
	message := func(text string) func(*fakeEngine, http.ResponseWriter, *http.Request) {
		return func(e *fakeEngine, w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) }
	}
	for name, test := range map[string]struct {
		call   string // which the engine answers in its own way, when it has made the image
		answer func(*fakeEngine, http.ResponseWriter, *http.Request)
		status int
		text   string
	}{
		"cannot be unpacked": {"/images/create",
			message(`{"error":"failed to unpack: link /b /a: no such file or directory"}`), 400,
			"no such file or directory): engine: failed"},
		"cannot be unpacked, as 26 with containerd's store says": {"/images/create",
			message(`{"error":"failed to unpack image: failed to extract layer sha256:fed1: mount callback ` +
				`failed on /a: link /a/b /a/c: no such file or directory: unknown"}`), 400,
			"no such file or directory): engine: failed"},
		"does not fit, as it says": {"/images/create",
			message(`{"error":"failed to unpack image: write /a: no space left on device: unknown"}`), 507,
			"no space left"},
		"does not fit": {"/images/create",
			message(`{"error":"failed to unpack: write /a: no space left on device"}`), 507, "no space left"},
		"has no id": {"/images/create", message(`{"status":"done"}`), 502, "which image"},
		"breaks off": {"/images/create", func(*fakeEngine, http.ResponseWriter, *http.Request) {
			panic(http.ErrAbortHandler)
		}, 503, "reached"},
		"cannot be tagged": {"/tag", func(_ *fakeEngine, w http.ResponseWriter, _ *http.Request) {
			reply(w, 500, "no space")
		}, 502, "no space"},
	} {
		e := newFakeEngine(t)
		d := startDaemon(t, e.host(), nil)
		e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, test.call) {
				return false
			}
			if r.URL.Query().Has("fromSrc") {
				io.Copy(io.Discard, r.Body)
				e.addImage(r.URL.Query().Get("repo") + ":" + r.URL.Query().Get("tag"))
			}
			test.answer(e, w, r)
			return true
		})
		if a := d.do(t, "POST", "/docker/image", wholeTar()); a.status != test.status ||
			!strings.Contains(a.body, test.text) {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
		if got := e.imageTags(); len(got) > 0 {
			t.Errorf("%s: images %q", name, got)
		}
	}
}

func TestWholeArchiveThatTheEngineCannotUnpackLeavesNothing(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	archive := string(archiveOf(file("first", "abc"), hardLink("link", "nothing")))
	d.do(t, "POST", "/docker/image", archive).want(t, 400, `"archive_refused"`,
		"(no such file or directory): engine: ")
	e.wantImages(t)
}

func TestListOfImagesIsRepeatedWhenOneGoesMeanwhile(t *testing.T) {
	t.Parallel()
	for gone, want := range map[int]answer{
		2:           {status: 200, body: "[]\n"},
		math.MaxInt: {status: 502, body: "content digest"},
	} {
		e := newFakeEngine(t)
		d := startDaemon(t, e.host(), nil)
		asked := 0
		e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
			if asked++; asked > gone {
				return false
			}
			reply(w, 404, "failed to read config content: NotFound: content digest sha256:47e4: not found")
			return true
		})
		if a := d.do(t, "GET", "/docker/image", ""); a.status != want.status ||
			!strings.Contains(a.body, want.body) {
			t.Errorf("after %d times: %d %s", gone, a.status, a.body)
		}
	}
}

func TestStartRemovesImportsThatADaemonLeft(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addImage("duxcore/import:0123456789ab")
	e.addImage("duxcore/import:fedcba987654")
	e.addImage(tempPrefix("/another/root") + "X")
	want := strings.Join(e.imageTags(), " ")
	var binds string
	startDaemon(t, e.host(), func(c *config) {
		binds = c.binds
		e.addImage(tempPrefix(binds) + "X")
		whole := e.findImage("duxcore/import:fedcba987654") // only its first tag is left to be removed
		whole.tags = append(whole.tags, tempPrefix(binds)+"Y")
	})
	if got := strings.Join(e.imageTags(), " "); got != want {
		t.Errorf("images %s, want %s", got, want)
	}
}

// An image that the engine makes only when the daemon has given up is removed by a later round. One
// that is still being imported is not.
func TestRoundsRemoveNoImportUnderWay(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.timeouts.settleInterval = 5 * time.Millisecond })
	held, release := crowdHold(e, func(call string) bool { return strings.Contains(call, "/tag?") })
	answered := crowdSend(t, d, "POST", "/docker/image", wholeTar())
	<-held
	rounds := func() (n int) {
		for _, call := range e.calls() {
			if strings.HasPrefix(call, "GET /images/json") {
				n++
			}
		}
		return n
	}
	before := rounds()
	waitFor(t, "three rounds", func() bool { return rounds() > before+3 })
	prefix := tempPrefix(d.binds)
	if got := e.imageTags(); len(got) != 1 || !strings.HasPrefix(got[0], prefix) {
		t.Errorf("in the middle of an import there are the images %q", got)
	}
	release()
	(<-answered).want(t, 201)
	e.addImage(prefix + "LATE")
	waitFor(t, "the late image to go", func() bool {
		return len(e.imageTags()) == 1 && !strings.HasPrefix(e.imageTags()[0], prefix)
	})
}

func imageWithVolumes(n int) string {
	volumes := map[string]struct{}{}
	for i := range n {
		volumes[fmt.Sprintf("/volume-%d", i)] = struct{}{}
	}
	text, _ := json.Marshal(map[string]any{"Config": map[string]any{"Volumes": volumes}})
	return string(text)
}

func TestImageThatSaysTooMuchIsRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		inspection, extra string
		status            int
		text              string
	}{
		"a configuration of 64 KiB": {`{"Config":{"Labels":{"a":"` + strings.Repeat("x", maxImageConfig-19) +
			`"}}}`, "", 201, ""},
		"a larger one": {`{"Config":{"Labels":{"a":"` + strings.Repeat("x", maxImageConfig-18) +
			`"}}}`, "", 400, "image: its configuration has more than 65536 bytes"},
		"much beside it": {`{"Comment":"` + strings.Repeat("x", maxImageConfig) + `","Config":{}}`,
			"", 201, ""},
		"32 volumes":                    {imageWithVolumes(32), "", 201, ""},
		"33 volumes":                    {imageWithVolumes(33), "", 400, "image: it has more than 32 volumes"},
		"working directory":             {`{"Config":{"WorkingDir":"/proc/self/fd/8"}}`, "", 400, "image: "},
		"working directory by a detour": {`{"Config":{"WorkingDir":"/a/..//proc"}}`, "", 400, "image: "},
		"working directory, relative":   {`{"Config":{"WorkingDir":"proc/self"}}`, "", 400, "image: "},
		"working directory overridden":  {`{"Config":{"WorkingDir":"/proc/1"}}`, `"working_dir":"/"`, 201, ""},
		"no configuration":              {`{}`, "", 201, ""},
		"no JSON":                       {`{`, "", 502, ""},
	} {
		e := newFakeEngine(t)
		d := startDaemon(t, e.host(), nil)
		for _, pulled := range []bool{false, true} {
			e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
				there := len(e.imageTags()) > 0
				if !strings.HasSuffix(r.URL.Path, "/images/img:1/json") || pulled && !there {
					return false
				}
				id := `{"Id":"` + e.addImage("img:1") + `",`
				io.WriteString(w, strings.Replace(strings.Replace(test.inspection, "{", id, 1), ",}", "}", 1))
				return true
			})
			if pulled {
				e.addRemote("img:1", true)
			} else {
				e.addImage("img:1")
			}
			a := d.do(t, "POST", "/service", createBodyJSON("web", test.extra)).want(t, test.status, test.text)
			if made := len(e.names()) > 0; made != (a.status == 201) {
				t.Errorf("%s: status %d, containers %q", name, a.status, e.names())
			}
			if a.status == 201 {
				d.do(t, "DELETE", "/service/web", "").want(t, 204)
			}
			e.setIntercept(nil)
			e.removeImages()
		}
	}
}

// loses matches what GNU tar says when it does not see how an archive goes on.
var loses = regexp.MustCompile(`next header|Unexpected EOF|look like a tar|zero block|not ` +
	`recoverable|extended header: (missing|length)`)

// FuzzImport: whatever passes for an image is one plain archive for GNU tar as for Go's reader, with
// the same entries, is nothing that the engine would decompress, and arrives byte for byte.
func FuzzImport(f *testing.F) {
	if out, err := exec.Command("tar", "--version").Output(); err != nil ||
		!bytes.Contains(out, []byte("GNU tar")) {
		f.Skip("needs GNU tar")
	}
	for _, seed := range []string{"", "no tar", wholeTar(), wholeTar() + wholeTar(), wholeTar()[:1024],
		polyglot("\x1f\x8b\x08"),
		polyglot("BZh9"), fileOfHoles(1000), fileOfHoles(1 << 40)} {
		f.Add([]byte(seed))
	}
	archives := [][]byte{goodArchive(f)}
	for _, row := range hostileArchives("/nowhere") {
		archives = append(archives, row.archive)
	}
	for _, archive := range archives {
		if unzipped, err := gzip.NewReader(bytes.NewReader(archive)); err == nil {
			if plain, _ := io.ReadAll(io.LimitReader(unzipped, 16<<10)); len(plain) < 16<<10 {
				f.Add(plain)
			}
		}
	}
	if err := checkTar(bytes.NewReader(withChecksums([]byte(wholeTar())))); err != nil {
		f.Fatalf("nothing passes: %v", err)
	}
	f.Fuzz(func(t *testing.T, archive []byte) {
		archive = withChecksums(bytes.Clone(archive))
		var passed bytes.Buffer
		if checkTar(io.TeeReader(bytes.NewReader(archive), &passed)) != nil {
			return
		}
		if !bytes.Equal(passed.Bytes(), archive) {
			t.Fatal("the check read other bytes than came")
		}
		if _, err := gzip.NewReader(bytes.NewReader(archive)); err == nil {
			t.Error("this is a gzip stream too")
		}
		if _, err := bzip2.NewReader(bytes.NewReader(archive)).Read(make([]byte, 1)); err == nil {
			t.Error("this is a bzip2 stream too")
		}
		entries := 0
		for r := tar.NewReader(bytes.NewReader(archive)); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			must(t, err)
			if h.Typeflag != tar.TypeXGlobalHeader { // which GNU tar does not list
				entries++
			}
		}
		list := exec.Command("tar", "--list", "--quoting-style=escape", "--file=-")
		list.Env = []string{"LC_ALL=C", "TZ=UTC"}
		list.Stdin = bytes.NewReader(archive)
		var complaints bytes.Buffer
		list.Stderr = &complaints
		out, err := list.Output() // an error may be an owner or a time that GNU tar does not know
		if got := bytes.Count(out, []byte("\n")); got != entries || loses.Match(complaints.Bytes()) {
			t.Errorf("GNU tar has %d entries, Go %d: %v\n%s%s", got, entries, err, out, complaints.Bytes())
		}
	})
}

func TestImportedImagesAreListedAndRemoved(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	pulled := e.addImage("img:1")
	d := startDaemon(t, e.host(), nil)
	d.do(t, "GET", "/docker/image", "").want(t, 200, "[]")
	imported := func() (id string) {
		t.Helper()
		var body struct {
			ID string `json:"image_id"`
		}
		must(t, json.Unmarshal([]byte(d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201).body), &body))
		return body.ID
	}
	id, pending := imported(), imported()
	if list := d.do(t, "GET", "/docker/image", "").want(t, 200, id, pending).body; strings.Contains(list,
		pulled) {
		t.Errorf("the list has an image that was not imported: %s", list)
	}
	for _, other := range []string{pulled, "sha256:" + strings.Repeat("0", 64), "img:1", "sha256:1", id[7:],
		id[:19], "duxcore%2Fimport:" + id[7:19]} {
		d.do(t, "DELETE", "/docker/image/"+other, "").want(t, 404, "no_such_image")
	}
	d.do(t, "POST", "/service", createBodyJSON("web", fmt.Sprintf(`"image":%q,"cmd":["x"]`, id))).want(t, 201)
	d.do(t, "PUT", "/service/web", createBodyJSON("web", fmt.Sprintf(`"image":%q,"cmd":["x"]`, pending))).want(t,
		204)
	for _, used := range []string{id, pending} {
		d.do(t, "DELETE", "/docker/image/"+used, "").want(t, 409, "image_in_use")
	}
	e.prune() // only the record speaks for the images now
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 409, "image_in_use")
	d.do(t, "DELETE", "/service/web", "").want(t, 204)
	e.answerWith("/import:"+id[7:19], 409,
		`{"message":"conflict: unable to remove repository reference: container 1 is using it"}`)
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 409, "image_in_use", "container 1 is using it")
	e.setIntercept(nil)
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 204)
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 404)
	d.do(t, "GET", "/docker/image", "").want(t, 200, pending)
}

func TestUploadDoesNotHoldUpTheShutdown(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	in, out := io.Pipe()
	defer out.Close()
	sent := make(chan struct{})
	go func() { // ends with the daemon
		defer close(sent)
		d.send(t, d.request(t, "POST", "/docker/image", in)).want(t, 503, "unavailable", "shutting down")
	}()
	io.WriteString(out, wholeTar()[:512])
	waitFor(t, "the upload's file", func() bool { return len(uploadsIn(t, d.binds)) > 0 })
	if err := d.stop(); err != nil { // else it would wait for its grace, and say so
		t.Error(err)
	}
	<-sent
}

func TestStalledUploadIsABadRequest(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.timeouts.uploadStall = 50 * time.Millisecond })
	conn := wireDial(t, d)
	io.WriteString(conn, d.head("POST /docker/image")+"Content-Length: 99999\r\n\r\n"+wholeTar())
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") ||
		!strings.Contains(string(answer), "the body came too slowly") {
		t.Errorf("got %q, %v", answer, err)
	}
}

func TestUploadThatAnnouncesTooMuchIsRefusedUnread(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), func(c *config) { c.maxImageBytes = 4 << 20 })
	conn := wireDial(t, d)
	io.WriteString(conn, d.head("POST /docker/image")+"Content-Length: 4194305\r\n\r\n")
	if status := wireStatus(t, conn); status != 413 {
		t.Errorf("answered %d", status)
	}
}

// The engine syncs nothing. A power cut could leave a damaged image with its tag, or bring one back.
func TestImagesAreSynced(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	e.addRemote("far:1", true)
	d := startDaemon(t, e.host(), nil)
	id := ""
	for _, step := range []struct{ method, path, body, calls string }{
		{"POST", "/docker/image", wholeTar(), "/images/create /info /tag? /info DELETE"},
		{"DELETE", "/docker/image/sha256:ID", "", "DELETE /info"},
		{"DELETE", "/docker/image/sha256:ID", "", "/info"}, // the first one's sync may have failed
		{"POST", "/service", createBodyJSON("web", `"image":"far:1"`), "/images/create /info"},
	} {
		before := len(e.calls())
		a := d.do(t, step.method, strings.Replace(step.path, "ID", id, 1), step.body)
		id = cmp.Or(anyID.FindString(a.body), id)
		calls := strings.Join(e.calls()[before:], "\n")
		got := regexp.MustCompile(`/images/create|/info|/tag\?|DELETE`).FindAllString(calls, -1)
		if strings.Join(got, " ") != step.calls || a.status > 204 && a.status != 404 {
			t.Errorf("%s %s: %d, by\n%s", step.method, step.path, a.status, calls)
		}
	}
}

// A record that cannot be read may be of a service that uses the image.
func TestImageIsNotRemovedWhileARecordIsDamaged(t *testing.T) {
	t.Parallel()
	_, d := startWithService(t)
	id := "sha256:" + anyID.FindString(d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201).body)
	must(t, os.WriteFile(filepath.Join(d.binds, recordDir, "web"), []byte("{"), 0o600))
	d.do(t, "DELETE", "/docker/image/"+id, "").want(t, 500, "internal")
	d.do(t, "GET", "/docker/image", "").want(t, 200, id)
}

// A PUT whose image is being removed either comes first, and the image stays, or finds no image.
func TestImageIsNotRemovedWhileAPutTakesIt(t *testing.T) {
	t.Parallel()
	e, d := startWithService(t)
	id := "sha256:" + anyID.FindString(d.do(t, "POST", "/docker/image", wholeTar()).want(t, 201).body)
	held, release := crowdHold(e, func(call string) bool { return strings.HasPrefix(call, "DELETE /images/") })
	defer release()
	deleted := crowdSend(t, d, "DELETE", "/docker/image/"+id, "")
	<-held
	put := crowdSend(t, d, "PUT", "/service/web", createBodyJSON("web",
		fmt.Sprintf(`"image":%q,"cmd":["x"]`, id)))
	select {
	case a := <-put:
		t.Fatalf("a PUT took an image that was being removed: %d %s", a.status, a.body)
	case <-time.After(200 * time.Millisecond):
	}
	release()
	(<-deleted).want(t, 204)
	(<-put).want(t, 404, "no_such_image")
}

// From its look at the image until it has written the record, a PUT keeps DELETE waiting.
func TestImageIsHeldUntilItIsReleased(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	x := bareServer(t, e, nil).images
	release, err := x.hold(t.Context(), serviceSpec{ImageID: e.addImage("img:1")})
	must(t, err)
	if x.held.TryLock() {
		t.Fatal("a DELETE does not wait")
	}
	release()
	if !x.held.TryLock() {
		t.Error("a DELETE waits for ever")
	}
}

func TestImportThatCannotBeSyncedAfterItsTagLeavesNoImage(t *testing.T) {
	t.Parallel()
	e := newFakeEngine(t)
	d := startDaemon(t, e.host(), nil)
	var syncs atomic.Int32
	e.setIntercept(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/info") || syncs.Add(1) != 2 {
			return false
		}
		reply(w, 500, "it cannot be synced")
		return true
	})
	d.do(t, "POST", "/docker/image", wholeTar()).want(t, 502, "it cannot be synced")
	e.wantImages(t)
}
