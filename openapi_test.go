package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// docs/openapi.json is what the core's client is made from. These tests take all that
// they send and expect from it, so that it cannot say what the daemon does not do.

type object = map[string]any

// apiOperation is one method of one path, with what it refers to in its place.
type apiOperation struct {
	method, path, name string
	success            int
	Parameters         []apiParameter
	RequestBody        apiBody
	Responses          map[int]apiBody    `json:"-"`
	All                map[string]apiBody `json:"responses"`
}

type apiParameter struct {
	Name, In string
	Required bool
	Schema   apiSchema
	Example  any
}

type apiBody struct {
	Headers map[string]apiParameter
	Content map[string]struct {
		Schema   apiSchema
		Examples map[string]struct{ Value any }
	}
}

// apiSchema has the keywords that the document uses.
type apiSchema struct {
	Type, Default                                    any
	Enum                                             []any
	Format, Pattern                                  string
	Minimum, Maximum, MinLength, MaxLength, MinItems *float64
	Properties                                       map[string]*apiSchema
	Required                                         []string
	Items, PropertyNames, AdditionalProperties, Not  *apiSchema
	OneOf                                            []*apiSchema
	nothing                                          bool // the schema false
	pattern                                          *regexp.Regexp
}

func (s *apiSchema) UnmarshalJSON(text []byte) error {
	type plain apiSchema
	if s.nothing = string(text) == "false"; s.nothing || string(text) == "true" {
		return nil
	}
	return json.Unmarshal(text, (*plain)(s))
}

type apiComponents struct {
	Schemas   map[string]*apiSchema
	Responses map[string]apiBody
}

// readAPI returns the operations by method and path, and what has a name.
func readAPI(t testing.TB) (operations map[string]apiOperation, named apiComponents) {
	t.Helper()
	var root object
	var doc struct {
		Paths      map[string]map[string]apiOperation
		Components apiComponents
	}
	text, err := os.ReadFile("docs/openapi.json")
	err = cmp.Or(err, json.Unmarshal(text, &root))
	text, _ = json.Marshal(apiInline(root, root))
	must(t, cmp.Or(err, json.Unmarshal(text, &doc)))
	operations = map[string]apiOperation{}
	for path, methods := range doc.Paths {
		for method, op := range methods {
			op.method, op.path = strings.ToUpper(method), path
			op.Responses = map[int]apiBody{}
			for status, body := range op.All {
				if n, err := strconv.Atoi(status); err == nil { // not the default, which is for generated clients
					op.Responses[n] = body
				}
			}
			op.name, op.success = op.method+" "+path, slices.Min(slices.Collect(maps.Keys(op.Responses)))
			operations[op.name] = op
		}
	}
	return operations, doc.Components
}

// apiInline returns v with what its references refer to in their place.
func apiInline(root, v any) any {
	switch v := v.(type) {
	case object:
		if ref, ok := v["$ref"].(string); ok {
			target := root
			for key := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
				target = target.(object)[key]
			}
			return apiInline(root, target)
		}
		for key := range v {
			v[key] = apiInline(root, v[key])
		}
	case []any:
		for i := range v {
			v[i] = apiInline(root, v[i])
		}
	}
	return v
}

// types returns the JSON types that a schema allows.
func (s *apiSchema) types() any {
	if s.OneOf == nil {
		return s.Type
	}
	var all []any
	for _, choice := range s.OneOf {
		all = append(all, choice.types())
	}
	return all
}

// fits reports whether a value is as its schema says.
func (s *apiSchema) fits(value any) bool {
	is := func(kind string) bool { return s.Type == nil || strings.Contains(fmt.Sprint(s.Type), kind) }
	within := func(n float64, least, most *float64) bool {
		return (least == nil || n >= *least) && (most == nil || n <= *most)
	}
	switch {
	case s == nil:
		return true
	case s.nothing || s.Enum != nil && !slices.Contains(s.Enum, value) || s.Not != nil && s.Not.fits(value):
		return false
	case s.OneOf != nil:
		fitting := 0
		for _, choice := range s.OneOf {
			if choice.fits(value) {
				fitting++
			}
		}
		return fitting == 1
	}
	switch v := value.(type) {
	case bool:
		return is("boolean")
	case float64:
		return is("integer") && v == math.Trunc(v) && within(v, s.Minimum, s.Maximum)
	case string:
		if _, err := netip.ParseAddr(v); s.Format == "ip" && err != nil {
			return false
		}
		return is("string") && within(float64(len(v)), s.MinLength, s.MaxLength) && s.matches(v)
	case []any:
		return is("array") && within(float64(len(v)), s.MinItems, nil) &&
			!slices.ContainsFunc(v, func(item any) bool { return !s.Items.fits(item) })
	case object:
		for name, field := range v {
			absent := field == "" && !slices.Contains(s.Required, name) // as ServiceParams says
			if !s.PropertyNames.fits(name) || !absent && !s.property(name).fits(field) {
				return false
			}
		}
		return is("object") && !slices.ContainsFunc(s.Required, func(name string) bool {
			_, ok := v[name]
			return !ok
		})
	}
	return is("null")
}

// matches reports whether a text matches the schema's pattern.
func (s *apiSchema) matches(text string) bool {
	if s.pattern == nil {
		s.pattern = regexp.MustCompile(s.Pattern)
	}
	return s.pattern.MatchString(text)
}

func (s *apiSchema) property(name string) *apiSchema {
	if declared, ok := s.Properties[name]; ok {
		return declared
	}
	return s.AdditionalProperties
}

// apiProbes are texts on both sides of the patterns.
var apiProbes = []any{"", "a", "aa", "a b", "a_b", "a.b", "-a", "a-", "é", "a\nb", "a\x00", "a:b", "a:b:c",
	":", "a:", "A", "A=1", "=1", "A=\x00",
	"a//b", "/a", "//a", "/a\u0085", "0", "1", "080", "99", "65535", "65536", "70000", "1000:1000", "80/tcp",
	"65535/udp", "1/sctp", "0/tcp", "65536/tcp", "080/tcp", "80/icmp", "80", "http://127.0.0.1:1/a",
	"ftp://127.0.0.1:1/a", "http://", "http:///a", "sha256:00", strings.Repeat("a", 64), strings.Repeat("a", 65),
	"TERM", "SIGTERM", "term", "SIGSIGTERM", "9", "64", "RTMIN+15", "RTMIN+16", "RTMAX-14", "RTMAX-15",
	"1795447530.5", "1795447530.", "2026-11-23T15:39:08Z", "2026-11-23T15:39:08.009300624+01:00",
	"2026-11-23T15:39:08", "2026-13-23T15:39:08Z",
	"2026-11-23T24:39:08Z", "2026-11-23", "2026-11-23T15:39:08.Z", "2026-11-23T15:39:08.0123456789Z"}

// vary calls try with value changed in one place, in every way that its schema speaks
// of, and with the name of the field at that place.
func (s *apiSchema) vary(value any, field string, try func(value any, field string)) {
	others := append([]any{value, nil, 5.5, "text", []any{}}, s.Enum...)
	if s.Default != nil {
		others = append(others, s.Default)
	}
	for _, choice := range append(slices.Clone(s.OneOf), s) {
		for _, limit := range []*float64{choice.Minimum, choice.Maximum} {
			if limit != nil {
				others = append(others, *limit-1, *limit, *limit+1)
			}
		}
	}
	if _, ok := value.(string); ok {
		others = append(others, apiProbes...)
	}
	if s.MaxLength != nil {
		others = append(others, strings.Repeat("a", int(*s.MaxLength)), strings.Repeat("a", int(*s.MaxLength)+1))
	}
	for _, other := range others {
		try(other, field)
	}
	for _, choice := range s.OneOf {
		if choice.fits(value) {
			choice.vary(value, field, try)
		}
	}
	if s.OneOf != nil {
		return
	}
	if list, ok := value.([]any); ok {
		for i := range list {
			s.Items.vary(list[i], field, func(item any, field string) {
				try(slices.Concat(list[:i], []any{item}, list[i+1:]), field)
			})
		}
	}
	fields, _ := value.(object)
	with := func(name string, v any) object {
		changed := maps.Clone(fields)
		changed[name] = v
		return changed
	}
	if fields != nil && s.Properties != nil {
		try(with("undocumented", 1.0), "undocumented")
	}
	for name, v := range fields {
		at := field
		if s.Properties[name] != nil {
			at = name
		}
		s.property(name).vary(v, at, func(v any, field string) { try(with(name, v), field) })
		without := with(name, nil)
		delete(without, name)
		if _, hasFields := v.(object); hasFields { // the daemon names the first field that is missing in it
			at = ""
		}
		try(maps.Clone(without), at)
		for _, probe := range apiProbes {
			if without[probe.(string)] = v; s.PropertyNames != nil {
				try(maps.Clone(without), field)
			}
			delete(without, probe.(string))
		}
	}
}

// apiWorld is a daemon, on an engine that has what the examples speak of.
type apiWorld struct {
	*fakeEngine
	*daemon
	source string // where bind_contents come from, in place of example.com
	image  string // the id of an imported image
}

// start starts a daemon that has the service demo, running, unless that is to be created.
func (op apiOperation) start(t *testing.T, change func(*config)) apiWorld {
	t.Helper()
	e := newFakeEngine(t)
	e.setDialect(dialects["20.10"]) // which the document's examples quote
	e.addImage("example/hello:1")
	source := serveOn(t, "127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		name, ok := map[string]string{"/demo.tar.gz": "hello", "/hostile.tar.gz": "../passwd"}[r.URL.Path]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
		}
		w.Write(tgz(file(name, "world")))
	})
	w := apiWorld{e, startDaemon(t, e.host(), func(c *config) {
		if c.fetchAllow = networks("127.0.0.0/8"); change != nil {
			change(c)
		}
	}), source.URL, "sha256:" + strings.Repeat("0", 64)}
	if strings.HasPrefix(op.path, "/docker/image/") {
		imported := w.do(t, "POST", "/docker/image", wholeTar()).want(t, 201)
		w.image = "sha256:" + anyID.FindString(imported.body)
	}
	if op.name != "POST /service" {
		w.do(t, "POST", "/service", createBodyJSON("demo", apiImage)).want(t, 201)
		w.do(t, "POST", "/service/demo/ctl", `{"op":"start"}`).want(t, 204)
	}
	return w
}

const apiImage = `"image":"example/hello:1"`

// bodies returns the operation's example bodies, the longest first.
func (op apiOperation) bodies() []string {
	bodies := []string{}
	for kind, media := range op.RequestBody.Content {
		if kind == "application/x-tar" {
			bodies = append(bodies, wholeTar())
		}
		for _, example := range media.Examples {
			bodies = append(bodies, apiText(example.Value, kind == "application/json"))
		}
	}
	slices.SortFunc(bodies, func(a, b string) int { return len(b) - len(a) })
	return append(bodies, "")[:max(1, len(bodies))]
}

func (op apiOperation) ask(t *testing.T, w apiWorld, query, body string) answer {
	t.Helper()
	path := strings.NewReplacer("{id}", "demo", "{image}", w.image).Replace(op.path)
	return w.do(t, op.method, path+query, strings.ReplaceAll(body, "https://example.com", w.source))
}

func TestAPIDocumentListsWhatThereIs(t *testing.T) {
	t.Parallel()
	operations, named := readAPI(t)
	documented, routes, offline := map[string]int{}, map[string]int{}, map[string]bool{}
	for _, rt := range (&server{}).routes() {
		routes[rt.pattern], offline[rt.pattern] = rt.success, rt.offline
	}
	for _, op := range operations {
		documented[op.name] = op.success
		statuses := []int{401, 503}
		if !offline[op.name] {
			statuses = append(statuses, 502)
		}
		if op.path != "/health" && op.path != "/service/{id}/params" { // which says 503, and waits for nobody
			statuses = append(statuses, 504)
		}
		if strings.Contains(op.path, "{id}") {
			statuses = append(statuses, 404)
		}
		if op.RequestBody.Content["application/json"].Examples != nil {
			statuses = append(statuses, 400, 413)
		}
		for _, status := range statuses {
			if _, ok := op.Responses[status]; !ok {
				t.Errorf("%s: no %d", op.name, status)
			}
		}
	}
	var kinds []string
	for _, kind := range named.Schemas["Failure"].Properties["kind"].Enum {
		kinds = append(kinds, kind.(string))
	}
	if slices.Sort(kinds); !slices.Equal(kinds, slices.Sorted(maps.Keys(kindsOfErrors()))) {
		t.Errorf("kinds of errors are %q, documented are %q", slices.Sorted(maps.Keys(kindsOfErrors())), kinds)
	}
	if !maps.Equal(documented, routes) {
		t.Errorf("documented are %v\nroutes are %v", documented, routes)
	}

	for name, of := range map[string]reflect.Type{"ServiceParams": reflect.TypeFor[serviceParams](),
		"HostMapEntry": reflect.TypeFor[hostMapEntry]()} {
		kinds, types, required := map[string]string{}, map[string]string{}, []string{}
		for key, schema := range named.Schemas[name].Properties {
			kinds[key] = fmt.Sprint(schema.types())
		}
		for field := range of.Fields() {
			key, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			key = cmp.Or(key, field.Name)
			kind := strings.TrimLeft(field.Type.String(), "*")
			types[key] = map[string]string{"string": "string", "[]string": "array", "bool": "boolean",
				"int64":           "integer",
				"main.stopSignal": "[string integer]", "map[string]main.hostMapEntries": "object"}[kind]
			if options == "" {
				required = append(required, key)
			}
		}
		if !maps.Equal(kinds, types) || !slices.Equal(named.Schemas[name].Required, required) {
			t.Errorf("%s: documented are %v, required %v; there are %v, required %v", name, kinds,
				named.Schemas[name].Required, types, required)
		}
	}
	params := named.Schemas["ServiceParams"].Properties
	if ends := params["port_map"].AdditionalProperties.types(); fmt.Sprint(ends) != "[object array]" {
		t.Errorf("port_map: an end is %v", ends)
	}
	params["stop_signal"] = params["stop_signal"].OneOf[0] // as a string
	for name, pattern := range map[string]*regexp.Regexp{"id": serviceID, "image": imageName,
		"hostname": hostLabel, "stop_signal": signalName} {
		if got := params[name].Pattern; got != pattern.String() {
			t.Errorf("%s: %s, the daemon's: %s", name, got, pattern)
		}
	}
}

func TestDefaultsOfTheAPIDocument(t *testing.T) {
	t.Parallel()
	operations, named := readAPI(t)
	w := operations["POST /service"].start(t, nil)
	made := func(extra string) string { // what the engine was asked to make
		w.do(t, "POST", "/service", createBodyJSON("demo", apiImage+extra)).want(t, 201)
		c, _ := w.container("demo")
		w.do(t, "DELETE", "/service/demo", "").want(t, 204)
		c.Config.Labels = nil
		text, _ := json.Marshal([]any{c.Config, c.HostConfig})
		return string(text)
	}
	for name, schema := range named.Schemas["ServiceParams"].Properties {
		if set, ok := schema.Default.(bool); ok {
			absent, same, other := made(""), made(fmt.Sprintf(",%q:%v", name, set)),
				made(fmt.Sprintf(",%q:%v", name, !set))
			if absent != same || absent == other {
				t.Errorf("%s: absent %s\nas documented %s\notherwise %s", name, absent, same, other)
			}
		}
	}
}

// Each example fits its schema, and each of a request succeeds.
func TestExamplesOfTheAPIDocument(t *testing.T) {
	t.Parallel()
	operations, _ := readAPI(t)
	for _, op := range operations {
		for _, body := range slices.AppendSeq([]apiBody{op.RequestBody}, maps.Values(op.Responses)) {
			for kind, media := range body.Content {
				for name, example := range media.Examples {
					if !media.Schema.fits(example.Value) {
						t.Errorf("%s: the example %s is not as its schema says", op.name, name)
					}
				}
				if len(media.Examples) == 0 && kind != "application/x-tar" {
					t.Errorf("%s: no example of %s", op.name, kind)
				}
			}
		}
		success := op.Responses[op.success]
		for _, body := range op.bodies() {
			a := op.ask(t, op.start(t, nil), "", body).want(t, op.success)
			for name, header := range success.Headers {
				if got := a.header.Get(name); got != header.Example {
					t.Errorf("%s: %s is %q", op.name, name, got)
				}
			}
			if _, ok := success.Content[a.header.Get("Content-Type")]; ok == (success.Content == nil) ||
				success.Content == nil && a.body != "" {
				t.Errorf("%s: %s %q", op.name, a.header.Get("Content-Type"), a.body)
			}
		}
	}
}

// What just fits the schema of a body or parameter is accepted, and what just does not
// is a 400 that names the field: fields, limits, patterns and choices.
func TestLimitsOfTheAPIDocument(t *testing.T) {
	t.Parallel()
	operations, _ := readAPI(t)
	for _, op := range operations {
		w := op.start(t, nil)
		if op.method == "GET" {
			apiStop(t, w) // or its logs would go on
		}
		tried := map[string]bool{}
		try := func(good bool, field, query, body string) {
			if good && op.method == "PUT" && slices.Contains([]string{"id", "bind_dir", "bind_contents"}, field) {
				return // it has to be the service's, or absent
			}
			if tried[query+" "+body] || len(tried)%5 > 0 && raceDetector() { // which finds nothing in more bodies
				tried[query+" "+body] = true
				return
			}
			tried[query+" "+body] = true
			a := op.ask(t, w, query, body)
			if good == (a.status == http.StatusBadRequest) || !good && !strings.Contains(a.body, field) {
				t.Errorf("%s%s %.500s: %d %s, but good is %v, by %q", op.name, query, body, a.status, a.body, good, field)
			}
			if location := a.header.Get("Location"); location != "" {
				w.do(t, "DELETE", location, "").want(t, 204)
			}
		}
		if media, ok := op.RequestBody.Content["application/json"]; ok {
			var example any
			must(t, json.Unmarshal([]byte(op.bodies()[0]), &example))
			media.Schema.vary(example, "", func(value any, field string) {
				try(media.Schema.fits(value), field, "", apiText(value, true))
			})
		}
		for _, p := range op.Parameters {
			if p.In == "query" {
				p.Schema.vary(p.Example, p.Name, func(value any, field string) {
					text := apiText(value, false)
					try(p.Schema.fits(value) || p.Schema.fits(text), field, "?"+p.Name+"="+url.QueryEscape(text), "")
				})
			}
		}
	}
}

// apiText returns a value as JSON, or as the text that it is.
func apiText(value any, asJSON bool) string {
	if text, ok := value.(string); ok && !asJSON {
		return text
	}
	text, _ := json.Marshal(value)
	return string(text)
}

// apiFailures tells how to get each error that the document has an example of: from the
// one operation, or from each that documents it.
var apiFailures = map[string]struct {
	only   string
	change func(*config)
	absent bool // no service demo
	setUp  func(*testing.T, apiWorld)
	query  string
	body   string
	ask    func(*testing.T, apiWorld) answer
}{
	"Unauthorized": {setUp: func(_ *testing.T, w apiWorld) { w.daemon.key = "" }},
	"NoService": {setUp: func(t *testing.T, w apiWorld) {
		w.do(t, "DELETE", "/service/demo", "").want(t, 204)
	}},
	"Unreachable": {setUp: func(t *testing.T, w apiWorld) {
		w.fakeEngine.close()
		w.do(t, "GET", "/health", "").want(t, 503)
	}},
	"NoEngine": {setUp: func(t *testing.T, w apiWorld) {
		w.fakeEngine.close()
		w.do(t, "GET", "/health", "").want(t, 503)
		w.setDialect(podman)
		w.reopen()
	}},
	"NotDone": {change: func(c *config) {
		c.createTimeout, c.stopTimeout, c.timeouts.engineRead = 50*time.Millisecond, 0, 50*time.Millisecond
	}, absent: true, setUp: func(t *testing.T, w apiWorld) {
		w.setIntercept(func(_ http.ResponseWriter, r *http.Request) bool { // or the answer would be a 503
			hangs := !strings.HasSuffix(r.URL.Path, "/_ping") && !strings.HasSuffix(r.URL.Path, "/version")
			if hangs {
				io.Copy(io.Discard, r.Body) // or net/http would not see that the daemon has hung up
				<-r.Context().Done()
			}
			return hangs
		})
		// The first round makes the directory, if it has had time for its look at the engine.
		must(t, os.MkdirAll(filepath.Join(w.binds, recordDir), 0o700))
		apiRecord(t, w, `{"params":{"id":"demo","bind_dir":"/data"},"revision":"1"}`)
	}},
	"InternalError": {only: "POST /service", setUp: func(t *testing.T, w apiWorld) {
		apiRecord(t, w, "damaged")
	}},
	"BindRootMoved": {setUp: func(_ *testing.T, w apiWorld) {
		os.RemoveAll(w.binds)
		os.Mkdir(w.binds, 0o700)
	}},
	"ContainerMissing": {setUp: func(_ *testing.T, w apiWorld) { w.drop("demo") }},
	"DiskFull": {only: "POST /service", setUp: func(t *testing.T, w apiWorld) {
		if os.Geteuid() != 0 {
			t.Skip("mounts a file system, which takes root")
		}
		mountTmpfs(t, filepath.Join(w.binds, recordDir), "nr_inodes=1")
	}},
	"ImageGone": {setUp: func(t *testing.T, w apiWorld) {
		w.do(t, "DELETE", "/docker/image/"+w.image, "").want(t, 204)
	}},
	"ImageInUse": {setUp: func(t *testing.T, w apiWorld) {
		w.do(t, "POST", "/service", createBodyJSON("other",
			fmt.Sprintf(`"image":%q,"cmd":["/hello"]`, w.image))).want(t, 201)
	}},
	"ImageRemoved": {setUp: func(t *testing.T, w apiWorld) {
		w.do(t, "PATCH", "/service/demo/env", `{"A":"1"}`).want(t, 204)
		w.removeImages()
	}, body: `{"op":"restart"}`},
	"PortTaken": {setUp: func(t *testing.T, w apiWorld) {
		w.do(t, "PUT", "/service/demo", apiCreate(`"port_map":{"80/tcp":{"HostPort":"8080"}}`)).want(t, 204)
		w.takePort("8080")
	}, body: `{"op":"restart"}`},
	"UnderWay": {change: func(c *config) {
		c.stopTimeout, c.timeouts.engineRead = 0, haste()
	}, setUp: func(t *testing.T, w apiWorld) {
		held, release := crowdHold(w.fakeEngine, func(call string) bool {
			return strings.HasPrefix(call, "DELETE ")
		})
		deleted := crowdSend(t, w.daemon, "DELETE", "/service/demo", "")
		t.Cleanup(func() { release(); <-deleted })
		<-held
	}},
	"RenamedByHand": {setUp: func(_ *testing.T, w apiWorld) { w.rename("demo", "old") }},
	"BodyTooLarge": {change: func(c *config) {
		c.maxImageBytes = maxJSON
	}, body: wholeTar() + strings.Repeat("\x00", maxJSON)},

	"UnknownField": {body: apiCreate(`"max_mem":1`)},
	"WrongType":    {body: apiCreate(`"max_ram":"64m"`)},
	"OutOfRange":   {body: apiCreate(`"max_ram":0`)},
	"NoImage":      {body: createBodyJSON("demo", `"image":"sha256:`+strings.Repeat("ab", 32)+`"`)},
	"NoCommand": {setUp: func(_ *testing.T, w apiWorld) {
		w.addImage("none:1")
		w.findImage("none:1").cmd = nil
	}, body: createBodyJSON("demo", `"image":"none:1"`)},
	"HostileArchive": {body: apiCreate(`"bind_contents":"https://example.com/hostile.tar.gz"`)},
	"DownloadFailed": {body: apiCreate(`"bind_contents":"https://example.com/missing.tar.gz"`)},
	"PrivateAddress": {change: func(c *config) {
		c.fetchAllow = nil
	}, body: apiCreate(`"bind_contents":"https://example.com/demo.tar.gz"`)},
	"ContentsTooLarge": {change: func(c *config) {
		c.maxBindBytes = 1024
	}, body: apiCreate(`"bind_contents":"https://example.com/demo.tar.gz"`)},
	"OtherDirectory": {body: apiCreate(`"bind_dir":"/other"`)},
	"WithContents":   {body: apiCreate(`"bind_contents":"https://example.com/demo.tar.gz"`)},
	"IDTaken": {setUp: func(t *testing.T, w apiWorld) {
		w.do(t, "POST", "/service", apiCreate("")).want(t, 201)
	}},
	"DirectoryTaken": {setUp: func(_ *testing.T, w apiWorld) {
		os.MkdirAll(filepath.Join(w.binds, "demo", "data"), 0o700)
	}},
	"UnknownOperation": {body: `{"op":"reload"}`},
	"BadVariable":      {body: `{"A=B":"1"}`},
	"BadSize":          {body: `{"rows":0,"cols":80}`},
	"BadStream":        {query: "?stream=x"},
	"BadParameter":     {query: "?tail=x"},
	"UnknownParameter": {query: "?lines=5"},
	"NoTar":            {body: strings.Repeat("\x00", 1024)},
	"CutOffTar":        {body: wholeTar()[:700]},
	"NotRunning":       {setUp: apiStop},
	"NoStdin":          {setUp: func(_ *testing.T, w apiWorld) { w.byName("demo").Config.OpenStdin = false }},
	"NoTTY":            {setUp: func(_ *testing.T, w apiWorld) { w.byName("demo").Config.Tty = false }},
	"CutOff": {ask: func(t *testing.T, w apiWorld) answer {
		a, _ := sendRaw(t, w.daemon,
			w.head("POST /service/demo/stdin")+"Transfer-Encoding: chunked\r\n\r\nno size\r\n")
		return a
	}},
}

func apiCreate(extra string) string { return createBodyJSON("demo", apiImage+","+extra) }

// apiRecord writes the record of the service demo.
func apiRecord(t *testing.T, w apiWorld, text string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(w.binds, recordDir, "demo"), []byte(text), 0o600))
}

func apiStop(t *testing.T, w apiWorld) {
	w.do(t, "POST", "/service/demo/ctl", `{"op":"stop"}`).want(t, 204)
}

// anyID stands in for ids, of which no two engines choose the same.
var anyID = regexp.MustCompile(`[0-9a-f]{64}`)

func (b apiBody) wantExample(t *testing.T, name string, a answer) {
	t.Helper()
	var got any
	must(t, json.Unmarshal([]byte(a.body), &got))
	example := b.Content["application/json"].Examples[name].Value
	is, want := anyID.ReplaceAllString(apiText(got, true), "ID"),
		anyID.ReplaceAllString(apiText(example, true), "ID")
	if is != want {
		t.Errorf("got  %s\nwant %s", is, want)
	}
	for header, documented := range b.Headers {
		if got := a.header.Get(header); got != fmt.Sprint(documented.Example) &&
			(documented.Required || got != "") {
			t.Errorf("%s is %q, want %v", header, a.header.Get(header), documented.Example)
		}
	}
}

// Each example of an error is what the daemon answers, byte for byte.
func TestErrorsOfTheAPIDocument(t *testing.T) {
	t.Parallel()
	operations, named := readAPI(t)
	provoked := map[string]bool{}
	for _, op := range operations {
		for status, response := range op.Responses {
			for name := range response.Content["application/json"].Examples {
				failure, ok := apiFailures[name]
				if status < 400 || ok && failure.only != "" && failure.only != op.name {
					continue
				}
				provoked[name] = true
				t.Run(op.name+" "+name, func(t *testing.T) {
					t.Parallel()
					in := op
					if failure.absent {
						in = operations["POST /service"]
					}
					w := in.start(t, failure.change)
					if failure.setUp != nil {
						failure.setUp(t, w)
					}
					if failure.ask == nil {
						failure.ask = func(t *testing.T, w apiWorld) answer {
							return op.ask(t, w, failure.query, cmp.Or(failure.body, op.bodies()[0]))
						}
					}
					response.wantExample(t, name, failure.ask(t, w).want(t, status))
				})
			}
		}
	}
	w, methods := operations["POST /service"].start(t, nil), map[string][]string{}
	for _, op := range operations {
		methods[op.path] = append(methods[op.path], op.method)
	}
	for path, methods := range methods {
		named.Responses["NoSuchPath"].wantExample(t, "NoSuchPath", w.do(t, "GET", "/more"+path, "").want(t, 404))
		a := w.do(t, "TRACE", path, "").want(t, 405)
		if slices.Sort(methods); a.header.Get("Allow") != strings.Join(methods, ", ") {
			t.Errorf("%s: Allow is %q", path, a.header.Get("Allow"))
		}
		if path == "/service" { // where the example is from
			named.Responses["MethodNotAllowed"].wantExample(t, "MethodNotAllowed", a)
		}
	}
	named.Responses["UnexpectedBody"].wantExample(t, "UnexpectedBody",
		w.do(t, "GET", "/service", "x").want(t, 413))
	old, _ := sendRaw(t, w.daemon, "GET /service HTTP/1.0\r\nHost: h\r\nX-Duxcore-CoreKey: "+w.key+"\r\n\r\n")
	named.Responses["HTTPVersionNotSupported"].wantExample(t, "HTTPVersionNotSupported", old.want(t, 505))
	for name := range apiFailures {
		if !provoked[name] {
			t.Errorf("%s is an example of no operation's", name)
		}
	}
}
